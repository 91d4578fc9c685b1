// Where conversations and settings are kept: in this browser only. Conversations lie in IndexedDB,
// in two stores: what the list shows, and everything; settings in localStorage.

const LONGEST_WAIT = 4000; // ms; a browser that does not open the database will not

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** Opens the store; where the browser has none, one that forgets (`lasting` is false). */
export async function openStore() {
  try {
    return new Lasting(await database());
  } catch {
    return new Forgetful();
  }
}

function database() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("earnest", 1);
    setTimeout(() => reject(new Error("no answer")), LONGEST_WAIT);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("heads", { keyPath: "id" });
      request.result.createObjectStore("conversations", { keyPath: "id" });
    };
    request.onsuccess = () => {
      request.result.onversionchange = () => request.result.close();
      resolve(request.result);
    };
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked"));
  });
}

const headOf = ({ id, title, updated }) => ({ id, title, updated });
const byAge = (heads) => heads.sort((a, b) => b.updated - a.updated);

class Lasting {
  lasting = true;

  constructor(opened) {
    this.database = opened;
    // Other windows of this browser show the same conversations.
    this.channel = new BroadcastChannel("earnest");
  }

  /** Called with the id of a conversation that another window changed (null: several). */
  onChange(listener) {
    this.channel.onmessage = (event) => listener(event.data);
  }

  #stores(mode) {
    const transaction = this.database.transaction(["heads", "conversations"], mode);
    const finished = new Promise((resolve, reject) => {
      transaction.oncomplete = () => resolve();
      transaction.onabort = () => reject(transaction.error);
      transaction.onerror = () => reject(transaction.error);
    });
    return [transaction.objectStore("heads"), transaction.objectStore("conversations"), finished];
  }

  /** What the list shows, newest first. */
  async list() {
    return byAge(await done(this.#stores("readonly")[0].getAll()));
  }

  async get(id) {
    return (await done(this.#stores("readonly")[1].get(id))) ?? null;
  }

  async all() {
    return byAge(await done(this.#stores("readonly")[1].getAll()));
  }

  /** Keep them: all, or none where there is no room. */
  async put(...changed) {
    const [heads, conversations, finished] = this.#stores("readwrite");
    for (const conversation of changed) {
      heads.put(headOf(conversation));
      conversations.put(conversation);
    }
    await finished;
    this.channel.postMessage(changed.length === 1 ? changed[0].id : null);
  }

  async remove(id) {
    const [heads, conversations, finished] = this.#stores("readwrite");
    heads.delete(id);
    conversations.delete(id);
    await finished;
    this.channel.postMessage(id);
  }

  async clear() {
    const [heads, conversations, finished] = this.#stores("readwrite");
    heads.clear();
    conversations.clear();
    await finished;
    this.channel.postMessage(null);
  }
}

class Forgetful {
  lasting = false;
  kept = new Map();

  onChange() {}

  async list() {
    return byAge([...this.kept.values()].map(headOf));
  }

  async get(id) {
    return structuredClone(this.kept.get(id) ?? null);
  }

  async all() {
    return byAge([...this.kept.values()]);
  }

  async put(...changed) {
    for (const conversation of changed) this.kept.set(conversation.id, structuredClone(conversation));
  }

  async remove(id) {
    this.kept.delete(id);
  }

  async clear() {
    this.kept.clear();
  }
}

/** A small value of localStorage, or `otherwise`. */
export function remembered(name, otherwise = null) {
  try {
    return JSON.parse(localStorage.getItem(`earnest.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Keep a small value; null forgets it. */
export function remember(name, value) {
  try {
    if (value === null) localStorage.removeItem(`earnest.${name}`);
    else localStorage.setItem(`earnest.${name}`, JSON.stringify(value));
  } catch {
    // It is forgotten with the page, then.
  }
}
