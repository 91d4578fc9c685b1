// The list of conversations, and the menu of each.

import { byId, el, iconButton } from "./dom.js";

const DAY = 24 * 3600 * 1000;

function groupOf(updated) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (updated >= today) return "Today";
  if (updated >= today - DAY) return "Yesterday";
  return updated >= today - 6 * DAY ? "This week" : "Earlier";
}

/**
 * `acts`: open(id), rename(id, title), remove(id), save(id, "md" or "json"), chooseFile() to import.
 */
export class Sidebar {
  #renaming = null;

  constructor(acts) {
    this.acts = acts;
    this.list = byId("conversations");
    this.menu = byId("menu");
    this.menu.addEventListener("keydown", (event) => this.#menuKey(event));
    this.menu.addEventListener("toggle", (event) => {
      if (event.newState === "closed") this.#opener?.setAttribute("aria-expanded", "false");
    });
  }

  #opener = null;

  /** Show `heads`, newest first; `current` is open, `busy` are being answered. */
  update(heads, current, busy) {
    if (this.#renaming) return; // not from under the reader's fingers
    const focused = document.activeElement?.closest?.("#conversations li")?.dataset.id;
    const groups = new Map();
    for (const head of heads) {
      const group = groupOf(head.updated);
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(this.#entry(head, head.id === current, busy.has(head.id)));
    }
    this.list.replaceChildren(
      ...[...groups].map(([name, entries]) => el("section", {}, el("h2", { text: name }), el("ul", {}, ...entries))),
    );
    if (focused) this.#entryOf(focused)?.querySelector("button")?.focus();
  }

  #entryOf = (id) => [...this.list.querySelectorAll("li")].find((entry) => entry.dataset.id === id);

  #entry(head, isCurrent, isBusy) {
    const title = head.title || "New conversation";
    const more = iconButton("more", `More: ${title}`, () => this.#openMenu(head, more), {
      title: "More",
      "aria-haspopup": "menu",
      "aria-expanded": "false",
    });
    return el(
      "li",
      { class: `entry${isCurrent ? " current" : ""}${isBusy ? " busy" : ""}`, "data-id": head.id },
      el("button", {
        type: "button",
        class: "row",
        "aria-current": isCurrent ? "page" : null,
        text: title,
        title,
        on: { click: () => this.acts.open(head.id) },
      }),
      more,
    );
  }

  #openMenu(head, opener) {
    const { acts, menu } = this;
    const entry = (text, act, kind = null) =>
      el("button", {
        type: "button",
        role: "menuitem",
        class: kind,
        tabindex: "-1",
        text,
        on: {
          click: () => {
            menu.hidePopover();
            act();
          },
        },
      });
    menu.replaceChildren(
      entry("Rename", () => this.rename(head)),
      entry("Export as Markdown", () => acts.save(head.id, "md")),
      entry("Export as JSON", () => acts.save(head.id, "json")),
      entry("Import from JSON", () => acts.chooseFile()),
      entry("Delete", () => acts.remove(head.id), "danger"),
    );
    this.#opener = opener;
    opener.setAttribute("aria-expanded", "true");
    menu.showPopover();
    const place = opener.getBoundingClientRect();
    menu.style.left = `${Math.max(8, Math.min(place.left, innerWidth - menu.offsetWidth - 8))}px`;
    menu.style.top = `${Math.max(8, Math.min(place.bottom + 4, innerHeight - menu.offsetHeight - 8))}px`;
    menu.firstChild.focus();
  }

  #menuKey(event) {
    const entries = [...this.menu.children];
    const at = entries.indexOf(document.activeElement);
    const to = {
      ArrowDown: (at + 1) % entries.length,
      ArrowUp: (at - 1 + entries.length) % entries.length,
      Home: 0,
      End: entries.length - 1,
    }[event.key];
    if (event.key === "Escape" || event.key === "Tab") {
      event.preventDefault();
      event.stopPropagation();
      this.menu.hidePopover();
      this.#opener?.focus();
    } else if (to !== undefined) {
      event.preventDefault();
      entries[to].focus();
    }
  }

  /** Put a field in place of the title. */
  rename(head) {
    const entry = this.#entryOf(head.id);
    if (!entry) return;
    const field = el("input", { type: "text", class: "rename", "aria-label": "Title", maxlength: 200 });
    field.value = head.title;
    const finish = (keep) => {
      if (this.#renaming !== field) return;
      this.#renaming = null;
      const title = field.value.trim();
      this.acts.rename(head.id, keep && title ? title : null);
    };
    field.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter" && !event.isComposing) finish(true);
      else if (event.key === "Escape") finish(false);
    });
    field.addEventListener("blur", () => finish(true));
    this.#renaming = field;
    entry.replaceChildren(field);
    field.focus();
    field.select();
  }
}
