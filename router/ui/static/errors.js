// What went wrong, for somebody who has never read the API's documentation.

const BY_CODE = {
  invalid_api_key: () => "This server needs an API key, and this one is not right.",
  overloaded: (_, wait) => `The servers are busy. Try again ${wait}.`,
  not_ready: () => "The servers are still starting. Try again in a moment.",
  draining: () => "This server is shutting down.",
  worker_unavailable: () => "A server was lost on the way. Try again in a moment.",
  context_length_exceeded: () => "This is too long for the model. Start a new chat, or use fewer or less detailed images.",
  invalid_image: (error) => `One of the images cannot be used: ${lower(error.message)}.`,
  request_too_large: () => "The images are too large to send together.",
  too_many_media_items: () => "These are too many images for one question.",
  request_quarantined: () => "This content has crashed servers before, so it is not tried again.",
  timeout: () => "This took longer than the server allows.",
  internal_error: () => "Something went wrong inside the server.",
};

/** One or two sentences about an error body (`{message, code, param}`) and its HTTP status. */
export function plainWords(error, status, retryAfter) {
  const wait = retryAfter ? `in ${retryAfter === "1" ? "a second" : `${retryAfter} seconds`}` : "in a moment";
  const known = BY_CODE[error.code];
  if (known) return known(error, wait);
  if (status === 413) return "This is too large for the server.";
  return error.message ? `The server says: ${error.message}.` : `The server answered with status ${status}.`;
}

function lower(message = "it cannot be read") {
  return message.charAt(0).toLowerCase() + message.slice(1);
}
