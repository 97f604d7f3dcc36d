// Requests and their server-sent events, and the text of a response without its tags.

/** Read the events of a response; yields [name, data]. The connection ends with the last one that is read. */
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      text += part.value;
      const events = text.split("\n\n");
      text = events.pop();
      for (const event of events) {
        const [, name, data] = event.match(/^event: (\w+)\ndata: (.*)$/s);
        yield [name, JSON.parse(data)];
      }
    }
  } finally {
    reader.cancel().catch(() => {});  // it may have failed
  }
}

/** The message of a response that is not 200. */
export async function errorOf(response) {
  const content = await response.json().catch(() => null);
  return content?.error ?? `The server answered with status ${response.status}.`;
}

/** Split a response, complete or not, into the reasoning and the parts around its targets. */
export function splitResponse(text) {
  const shown = text.replace(/<[^<>]*$/, "");  // a tag of which only the beginning has arrived
  const [, reasoning, rest] = shown.match(/^\s*(?:<think>)?(.*?)(?:<\/think>(.*))?$/s);
  return {
    reasoning: reasoning.replaceAll(/<[^<>]*>/g, "").trim(),
    parts: (rest ?? "").trim().split("<REF_POS>").map((part) => part.replaceAll(/<[^<>]*>/g, "")),
  };
}
