// JSON Schema in words: what a value may be, and what fields it has.

const LIMITS = { minimum: "≥ ", exclusiveMinimum: "> ", maximum: "≤ ", exclusiveMaximum: "< " };
const LENGTHS = { minItems: "at least ", minLength: "at least ", maxItems: "at most ", maxLength: "at most " };
const COMBINED = ["anyOf", "oneOf", "allOf"];

/** The schemas of a document, by the references to them. */
export class Schemas {
  constructor(document) {
    this.document = document;
  }

  /** What a schema refers to, or itself. */
  resolve(schema) {
    if (!schema?.$ref) return schema ?? {};
    const parts = schema.$ref.replace(/^#\//, "").split("/");
    return parts.reduce((found, part) => found?.[part.replaceAll("~1", "/").replaceAll("~0", "~")], this.document) ?? {};
  }

  /** The name of what a schema refers to. */
  name(schema) {
    return this.resolve(schema).title ?? schema.$ref.split("/").at(-1);
  }

  /** What a value may be, in a few words. */
  words(schema) {
    if (schema.$ref) return this.name(schema);
    if ("const" in schema) return JSON.stringify(schema.const);
    if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
    for (const how of COMBINED) {
      if (schema[how]) return [...new Set(schema[how].map((one) => this.words(one)))].join(" or ");
    }
    const type = Array.isArray(schema.type) ? schema.type.join(" or ") : schema.type;
    const limits = Object.entries(LIMITS).filter(([name]) => name in schema).map(([name, sign]) => sign + schema[name]);
    const lengths = Object.entries(LENGTHS).filter(([name]) => name in schema).map(([name, sign]) => sign + schema[name]);
    const more = [...(schema.format ? [schema.format] : []), ...limits, ...lengths].join(", ");
    const ending = more ? ` (${more})` : "";
    if (type === "array") {
      const of = this.words(schema.items ?? {});
      return `list of ${of.includes(" or ") ? `(${of})` : of}${ending}`;
    }
    const values = schema.additionalProperties;
    if (type === "object" && !schema.properties && values && values !== true) return `object of ${this.words(values)}${ending}`;
    return (type ?? "anything") + ending;
  }

  /** The objects with fields that a value may be, or be made of: [{ name, text, schema }]. */
  objects(schema) {
    const found = this.resolve(schema);
    if (found.properties) {
      return [{ name: schema.$ref ? this.name(schema) : "", text: found.description ?? "", schema: found }];
    }
    const parts = [...COMBINED.flatMap((how) => found[how] ?? []), found.items, found.additionalProperties];
    return parts.filter((part) => part && part !== true).flatMap((part) => this.objects(part));
  }

  /** The fields of an object: [{ name, schema, required }], required ones first. */
  fields(schema) {
    const required = new Set(schema.required);
    const all = Object.entries(schema.properties ?? {}).map(([name, one]) => ({ name, schema: one, required: required.has(name) }));
    return [...all.filter((field) => field.required), ...all.filter((field) => !field.required)];
  }

  /** Every name of a field in a schema and in what it is made of. */
  names(schema, seen = new Set()) {
    return this.objects(schema).flatMap((object) => {
      if (seen.has(object.schema)) return [];
      seen.add(object.schema);
      return this.fields(object.schema).flatMap((field) => [field.name, ...this.names(field.schema, seen)]);
    });
  }
}
