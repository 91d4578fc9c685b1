// A message on the page.

import { copyButton, el, icon, iconButton } from "./dom.js";
import { show } from "./markdown.js";
import { tokenView } from "./tokens.js";

const MOST_MARKED = 500_000; // characters, a second of laying out; longer answers are shown as they are written

const seconds = (value) => (value < 10 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`);

/**
 * Shows a node and follows it as it grows.
 *
 * `acts`: what the reader can do: regenerate(node), edit(node, text), showVersion(node), enterKey(),
 * openSettings(), startNew().
 */
export class MessageView {
  #tokens = null;
  #asTokens = false;

  constructor(node, kind, acts) {
    Object.assign(this, { node, kind, acts });
    const answer = node.role === "assistant";
    this.body = el("div", { class: "body", dir: "auto", lang: "" });
    this.article = el("article", { "aria-label": answer ? "Model" : "You" });
    this.element = el("li", { class: `message ${node.role} ${kind}` }, this.article);
    if (answer) {
      this.thoughtsTitle = el("span");
      this.thoughtsText = el("div", { class: "thoughts-text" });
      this.thoughts = el(
        "details",
        { class: "thoughts", hidden: true },
        el("summary", {}, icon("right"), this.thoughtsTitle),
        this.thoughtsText,
      );
      this.article.append(this.thoughts);
    }
    this.problem = el("div", { class: "problem", role: "alert", hidden: true });
    this.actions = el("footer", { class: "actions" });
    this.article.append(this.body, this.problem, this.actions);
  }

  /** Bring what is shown up to date. `versions`: of the node, itself among them. */
  update(versions = this.versions) {
    this.versions = versions;
    const { node } = this;
    const running = node.state === "running";
    this.article.setAttribute("aria-busy", String(running));
    this.element.classList.toggle("running", running);
    this.element.classList.toggle("silent", running && !node.content);
    if (this.thoughts) this.#showThoughts(running);
    if (!this.#asTokens) this.#showText();
    this.#showProblem();
    if (!running) this.#showActions();
    else this.actions.replaceChildren(...this.#stats());
  }

  #showText() {
    const { node } = this;
    const marked = node.role === "assistant" && this.kind === "chat" && node.content.length <= MOST_MARKED;
    this.body.className = marked ? "body prose" : "body plain";
    if (marked) show(this.body, node.content);
    else if (this.body.textContent !== node.content) this.body.textContent = node.content;
  }

  #showThoughts(running) {
    const { node } = this;
    this.thoughts.hidden = !node.reasoning;
    if (!node.reasoning) return;
    const thinking = running && !node.content;
    this.thoughts.classList.toggle("thinking", thinking);
    this.thoughtsTitle.textContent = thinking
      ? "Thinking…"
      : node.thought === undefined
        ? "Thoughts"
        : `Thought for ${seconds(node.thought / 1000)}`;
    const text = node.reasoning.trim();
    if (this.thoughtsText.textContent !== text) this.thoughtsText.textContent = text;
  }

  #showProblem() {
    const { problem, state } = this.node;
    const shown = state === "failed" && problem;
    if (Boolean(shown) === !this.problem.hidden) return;
    this.problem.hidden = !shown;
    if (!shown) return;
    const button = (text, act) => el("button", { type: "button", class: "link", text, on: { click: act } });
    const buttons = [];
    if (problem.kind === "key") buttons.push(button("Enter the key", () => this.acts.enterKey()));
    if (problem.kind === "settings") buttons.push(button("Settings", () => this.acts.openSettings()));
    if (problem.kind === "long") buttons.push(button("New conversation", () => this.acts.startNew()));
    buttons.push(button("Try again", () => this.acts.regenerate(this.node)));
    this.problem.replaceChildren(
      el("p", {}, el("strong", { text: problem.title }), " ", problem.remedy),
      ...(problem.said ? [el("p", { class: "said", text: problem.said })] : []),
      el("p", { class: "buttons" }, ...buttons),
    );
  }

  #showActions() {
    const { node, acts } = this;
    const buttons = [];
    if (this.versions.length > 1) buttons.push(this.#versions());
    if (node.content) buttons.push(copyButton("Copy", () => node.content));
    if (node.role === "user") buttons.push(iconButton("edit", "Edit", () => this.edit()));
    else if (node.content || node.reasoning || node.state !== "failed") {
      buttons.push(iconButton("again", this.kind === "chat" ? "Regenerate" : "Write this again", () => acts.regenerate(node)));
    }
    if (node.tokens?.length > 0) {
      buttons.push(
        iconButton("chance", "Token probabilities", () => this.#toggleTokens(), { "aria-pressed": String(this.#asTokens) }),
      );
    }
    this.actions.replaceChildren(...buttons, ...this.#stats());
  }

  #versions() {
    const at = this.versions.indexOf(this.node);
    const step = (name, label, to) =>
      iconButton(name, label, () => this.acts.showVersion(this.versions[to]), { disabled: !this.versions[to] });
    return el(
      "span",
      { class: "versions", role: "group", "aria-label": "Versions" },
      step("left", "Earlier version", at - 1),
      el("span", { text: `${at + 1} / ${this.versions.length}` }),
      step("right", "Later version", at + 1),
    );
  }

  #stats() {
    const { stats, state, finish } = this.node;
    if (this.node.role === "user") return [];
    const parts = [];
    if (stats?.tokens) parts.push(`${stats.tokens} ${stats.tokens === 1 ? "token" : "tokens"}`);
    if (stats?.speed) parts.push(`${stats.speed.toFixed(stats.speed < 100 ? 1 : 0)} tokens/s`);
    if (stats?.first && state !== "running") parts.push(`first after ${stats.first.toFixed(stats.first < 10 ? 2 : 0)} s`);
    if (state === "stopped") parts.push("stopped");
    else if (finish === "length") parts.push("cut off at the token limit");
    if (parts.length === 0) return [];
    const prompt = stats?.prompt && `Read ${stats.prompt} tokens, ${stats.cached ?? 0} of them from the cache`;
    return [el("span", { class: "stats", title: prompt || null, text: parts.join(" · ") })];
  }

  #toggleTokens() {
    this.#asTokens = !this.#asTokens;
    if (this.#asTokens) {
      this.#tokens = tokenView(this.node.tokens);
      this.body.replaceWith(this.#tokens);
    } else this.#tokens.replaceWith(this.body);
    this.#showActions();
    this.actions.querySelector("[aria-pressed]").focus();
  }

  /** Write it anew, in its place. */
  edit() {
    const area = el("textarea", { class: "editor", "aria-label": "Edit the message", dir: "auto", rows: Math.min(12, this.node.content.split("\n").length) });
    area.value = this.node.content;
    const close = () => {
      form.replaceWith(this.body);
      this.actions.hidden = false;
      this.actions.querySelector("[aria-label='Edit']")?.focus();
    };
    const form = el(
      "form",
      {
        class: "editing",
        on: {
          submit: (event) => {
            event.preventDefault();
            const text = area.value;
            if (!text.trim()) return;
            close();
            this.acts.edit(this.node, text);
          },
          keydown: (event) => {
            if (event.key === "Escape") {
              event.stopPropagation();
              close();
            } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
          },
        },
      },
      area,
      el(
        "div",
        { class: "buttons" },
        el("button", { type: "button", class: "plain-button", text: "Cancel", on: { click: close } }),
        el("button", { type: "submit", class: "main-button", text: this.kind === "chat" ? "Send" : "Continue from here" }),
      ),
    );
    this.body.replaceWith(form);
    this.actions.hidden = true;
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}
