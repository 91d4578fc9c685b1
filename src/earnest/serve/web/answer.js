// One answer under way: what is asked of the server, and what its events mean for a node.

import { Failure, stream } from "./api.js";
import { messagesBefore, textBefore } from "./conversation.js";

export const ALTERNATIVES = 5; // likeliest tokens that are kept beside each
const PLAIN_TOKENS = 256; // plain text has no end of its own

/** The request for a node's text. */
export function requestFor(conversation, node, served, settings) {
  const body = { model: served.name, stream: true, stream_options: { include_usage: true }, ...settings.sampling };
  if (conversation.kind === "text") {
    body.prompt = textBefore(conversation, node);
    body.max_tokens ??= PLAIN_TOKENS;
    if (settings.probabilities) body.logprobs = ALTERNATIVES;
    return ["v1/completions", body];
  }
  body.messages = messagesBefore(conversation, node);
  if (settings.probabilities) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
  if (settings.thinking !== null) body.enable_thinking = settings.thinking;
  return ["v1/chat/completions", body];
}

export class Answer {
  #control = new AbortController();
  #begun = performance.now();
  #first = 0;
  #last = 0;
  #counted = 0;
  #usage = null;

  /**
   * @param {object} conversation
   * @param {object} node its content grows
   * @param {() => void} onChange
   */
  constructor(conversation, node, onChange) {
    Object.assign(this, { conversation, node, onChange });
  }

  /** Give it up: the connection closes, and the server ends it. What has come is kept. */
  stop() {
    this.#control.abort();
  }

  /** Have it written; returns when it has come to an end, whichever. */
  async run(served, settings) {
    const { node } = this;
    node.model = served.name;
    try {
      const [path, body] = requestFor(this.conversation, node, served, settings);
      for await (const event of stream(path, body, this.#control.signal)) {
        this.#take(event);
        this.onChange();
      }
      node.state = "done";
    } catch (error) {
      if (this.#control.signal.aborted) node.state = "stopped";
      else {
        node.state = "failed";
        const known = error instanceof Failure ? error : new Failure("other", "The page failed.", "Reload it.", String(error));
        node.problem = { kind: known.kind, title: known.title, remedy: known.remedy, said: known.said };
      }
    }
    node.stats = this.#stats();
    this.conversation.updated = Date.now();
    this.onChange();
  }

  #take(event) {
    if (event.usage) this.#usage = event.usage;
    const [choice] = event.choices ?? [];
    if (!choice) return;
    const { node } = this;
    const delta = choice.delta ?? { content: choice.text };
    const tokens = tokensOf(choice.logprobs);
    if (delta.reasoning_content || delta.content || tokens.length > 0) {
      this.#last = performance.now();
      this.#first ||= this.#last;
      this.#counted += tokens.length || 1;
    }
    if (delta.reasoning_content) node.reasoning += delta.reasoning_content;
    if (delta.content) {
      if (node.reasoning && node.thought === undefined) node.thought = this.#last - this.#first;
      node.content += delta.content;
    }
    node.tokens.push(...tokens);
    if (choice.finish_reason) node.finish = choice.finish_reason;
    node.stats = this.#stats();
  }

  #stats() {
    const tokens = this.#usage?.completion_tokens ?? this.#counted;
    const seconds = (this.#last - this.#first) / 1000;
    return {
      tokens,
      first: this.#first ? (this.#first - this.#begun) / 1000 : null,
      // The first token is the prompt's work: the others tell the speed.
      speed: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null,
      prompt: this.#usage?.prompt_tokens ?? null,
      cached: this.#usage?.prompt_tokens_details?.cached_tokens ?? null,
    };
  }
}

/** `[text, logprob, [[text, logprob] of the likeliest]]` each, from either endpoint's form. */
export function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map(({ token, logprob, top_logprobs: top }) => [
      token,
      logprob,
      (top ?? []).map((other) => [other.token, other.logprob]),
    ]);
  }
  return (logprobs.tokens ?? []).map((token, i) => [
    token,
    logprobs.token_logprobs[i],
    Object.entries(logprobs.top_logprobs?.[i] ?? {}).sort((a, b) => b[1] - a[1]),
  ]);
}
