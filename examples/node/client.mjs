// Ask a Motet server from Node.js: stream an answer of an ensemble, and tell the errors apart. The protocol is read from
// proto/ as it is; nothing is generated.
//
//     npm ci --prefix examples/node
//     node examples/node/client.mjs "What is a motet?" --mix code=0.3,docs=0.7 --address 127.0.0.1:50051

import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const ROOT = fileURLToPath(new URL("../../proto", import.meta.url));
// 64-bit seeds as strings (a JavaScript number holds 53 bits), enums by name, and only those fields that were sent.
const definition = protoLoader.loadSync(["motet/v1/inference.proto", "motet/v1/admin.proto"], {
  includeDirs: [ROOT],
  keepCase: true,
  longs: String,
  enums: String,
});
const { Inference } = grpc.loadPackageDefinition(definition).motet.v1;

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    address: { type: "string", default: "127.0.0.1:50051" },
    mix: { type: "string" }, // name=coefficient,…; default: the bundle's own
    "max-tokens": { type: "string", default: "200" },
    temperature: { type: "string", default: "0.7" },
    seed: { type: "string" }, // default: the server draws one
  },
});
if (positionals.length !== 1) {
  console.error("usage: client.mjs PROMPT [--mix NAME=COEFFICIENT,…] [--address HOST:PORT]");
  process.exit(2);
}

const request = {
  prompt: { messages: { messages: [{ role: "user", content: positionals[0] }] } },
  sampling: { temperature: Number(values.temperature), top_p: 0.95, ...(values.seed && { seed: values.seed }) },
  stopping: { max_tokens: Number(values["max-tokens"]) },
};
if (values.mix) {
  const pairs = values.mix.split(",").map((text) => text.split("="));
  request.ensemble = { members: pairs.map(([name, mix]) => ({ name, mix: Number(mix) })), space: "LOGITS" };
}

const client = new Inference(values.address, grpc.credentials.createInsecure());
const call = client.Generate(request, { deadline: Date.now() + 60_000 });
process.on("SIGINT", () => call.cancel()); // the server stops computing

call.on("data", (delta) => {
  process.stdout.write(delta.text ?? "");
  if (delta.finish_reason) {
    const { finish_reason, seed, usage } = delta;
    process.stdout.write("\n");
    console.error(`[${finish_reason.toLowerCase()}, ${usage.completion_tokens} tokens, seed ${seed ?? 0}]`);
  }
});
// What went wrong is a gRPC status; its message says the field, the limit, the value and what to change.
call.on("error", (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = error.code === grpc.status.INVALID_ARGUMENT ? 2 : 1;
});
call.on("close", () => client.close());
