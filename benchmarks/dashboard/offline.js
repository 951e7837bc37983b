"use strict";

// asv's pages ask a server for JSON. Here they get it from `asvFiles`, so that they open from a folder too.
$.ajaxTransport("+json", (options) => {
  const name = decodeURIComponent(options.url.split("?")[0]);
  return {
    send: (_headers, complete) =>
      setTimeout(() =>
        name in asvFiles ? complete(200, "OK", { json: asvFiles[name] }) : complete(404, "Not Found"),
      ),
    abort: () => {},
  };
});
