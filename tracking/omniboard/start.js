"use strict";
// Starts Omniboard with what it lacks by itself: it listens on one address only, survives an outage of MongoDB, and
// answers no page of another site. Settings are environment variables; docs/tracking.md describes them.

const crypto = require("crypto");
const http = require("http");

const LOOPBACK = ["127.0.0.1", "localhost", "::1"];

function fail(sentence) {
  console.error(`error: ${sentence}`);
  process.exit(2);
}

function mongoUri(env) {
  if (env.MONGO_URI) return env.MONGO_URI;
  if (!env.SACRED_PASSWORD) fail("neither MONGO_URI nor SACRED_PASSWORD is set, so there is no MongoDB to show");
  const credentials = `sacred:${encodeURIComponent(env.SACRED_PASSWORD)}`;
  return `mongodb://${credentials}@${env.MONGO_HOST || "127.0.0.1:27017"}/sacred?authSource=admin`;
}

// The login as Omniboard's -u takes it, or "" for none, which is for this machine alone.
function login(env, published) {
  const { OMNIBOARD_USER: user = "", OMNIBOARD_PASSWORD: password = "" } = env;
  if (!user && !password) {
    if (!LOOPBACK.includes(published))
      fail(
        `BIND_ADDRESS ${published} lets other machines in, so Omniboard needs a login: set OMNIBOARD_USER and ` +
          "OMNIBOARD_PASSWORD, or BIND_ADDRESS to 127.0.0.1",
      );
    return "";
  }
  if (!user || !password || `${user}${password}`.includes(":"))
    fail("OMNIBOARD_USER and OMNIBOARD_PASSWORD must both be set, and have no colon in them");
  return `${user}:${password}:${crypto.randomBytes(32).toString("hex")}`;
}

const listens = process.env.LISTEN_ADDRESS || process.env.BIND_ADDRESS || "127.0.0.1";
const published = process.env.BIND_ADDRESS || listens;
const credentials = login(process.env, published);
process.env.MONGO_URI = mongoUri(process.env);
if (credentials) process.argv.push("-u", credentials); // not seen in the list of processes

// Omniboard names no address to listen on, which means all of them.
const listen = http.Server.prototype.listen;
http.Server.prototype.listen = function (port, callback) {
  this.once("listening", () => console.log(`Omniboard: http://${listens}:${this.address().port}/`));
  return listen.call(this, Number(port), listens, callback);
};

// Omniboard lets pages of any site read and delete runs (CORS). Without those headers browsers keep them out; and
// without a login, so does asking for our own name, which a page that has its name point here (DNS rebinding) fails.
const setHeader = http.ServerResponse.prototype.setHeader;
http.ServerResponse.prototype.setHeader = function (name, value) {
  return /^access-control-/i.test(name) ? this : setHeader.call(this, name, value);
};
const emit = http.Server.prototype.emit;
http.Server.prototype.emit = function (event, request, response) {
  if (event === "request" && !credentials) {
    const host = (request.headers.host || "").replace(/:\d+$/, "").replace(/^\[|\]$/g, "");
    if (!LOOPBACK.includes(host)) {
      response.writeHead(403, { "Content-Type": "text/plain" });
      response.end("Omniboard without a login is for localhost only.\n");
      return true;
    }
  }
  return emit.apply(this, arguments);
};

// The connection that Omniboard asks for never comes back after an outage of more than 30 seconds.
const omniboard = require.resolve("omniboard/package.json");
const mongoose = require(require.resolve("mongoose", { paths: [omniboard] }));
const openUri = mongoose.Connection.prototype.openUri;
mongoose.Connection.prototype.openUri = function (uri, options, callback) {
  const unified = { useNewUrlParser: true, useUnifiedTopology: true, serverSelectionTimeoutMS: 5000, autoIndex: false };
  const opened = openUri.call(this, uri, unified, typeof options === "function" ? options : callback);
  if (opened && opened.catch) opened.catch(() => {}); // Omniboard tries again when it hears of the error
  return opened;
};
mongoose.set("useFindAndModify", false);
mongoose.set("useCreateIndex", true);

require("omniboard/dist/start.js");
