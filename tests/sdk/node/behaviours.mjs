// What OpenAI's client for Node must be able to do, unmodified. `../behaviours/test_node.py` starts this with the
// address of the service, and reads one JSON line a behaviour: {"behaviour": its name, "error": null or how it failed}.
// The answers themselves are held against OpenAI's types on the wire.

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import OpenAI, { toFile } from "openai";

const { baseURL, apiKey, model, training, finished, broken } = JSON.parse(process.env.ANNEAL_SDK_SUITE);
const client = new OpenAI({ baseURL, apiKey });
const jobs = client.fineTuning.jobs;
const row = { messages: [{ role: "user", content: "hello" }, { role: "assistant", content: "thank" }] };
const content = Buffer.from(`${JSON.stringify(row)}\n`.repeat(4));
const behaviours = [];

function behaviour(name, run) {
  behaviours.push([name, run]);
}

/** A client whose next answer to `method` on a path like `pattern` is lost, once the service has done the work. */
function forgetful(method, pattern, times = 1) {
  const lost = []; // the retry counts of the requests whose answers were
  const forgetfulFetch = async (url, init) => {
    const answer = await fetch(url, init);
    if (times > 0 && init.method.toUpperCase() === method && pattern.test(new URL(url).pathname)) {
      times -= 1;
      lost.push(new Headers(init.headers).get("x-stainless-retry-count"));
      await answer.arrayBuffer();
      throw new TypeError("the connection was lost");
    }
    return answer;
  };
  return [new OpenAI({ baseURL, apiKey, fetch: forgetfulFetch }), lost];
}

async function upload(purpose = "fine-tune", bytes = content, name = "rows.jsonl", more = {}) {
  return client.files.create({ file: await toFile(bytes, name), purpose, ...more });
}

async function all(pages) {
  const found = [];
  for await (const one of pages) found.push(one);
  return found;
}

const tags = () => ({ node: `${process.pid}-${Math.random()}` });
let ready; // one training file for all jobs
async function create(choices = {}) {
  ready ??= upload();
  return jobs.create({ model, training_file: (await ready).id, training, ...choices });
}

behaviour("a file is created from a buffer", async () => {
  const file = await upload();
  assert.equal(file.object, "file");
  assert.equal(file.bytes, content.length);
  assert.equal(file.filename, "rows.jsonl");
  assert.equal(file.status, "processed");
});

behaviour("a file is created from a stream", async () => {
  const name = path.join(fs.mkdtempSync(path.join(os.tmpdir(), "anneal-")), "rows.jsonl");
  fs.writeFileSync(name, content);
  const file = await client.files.create({ file: fs.createReadStream(name), purpose: "fine-tune" });
  fs.rmSync(path.dirname(name), { recursive: true });
  assert.equal(file.bytes, content.length);
  assert.equal(file.filename, "rows.jsonl");
});

behaviour("a file is created from a File", async () => {
  const file = await client.files.create({ file: new File([content], "Übung.jsonl"), purpose: "fine-tune" });
  assert.equal(file.filename, "Übung.jsonl");
});

behaviour("a file is created from a Response", async () => {
  const file = await client.files.create({ file: await toFile(new Response(content), "a.jsonl"), purpose: "fine-tune" });
  assert.equal(file.bytes, content.length);
});

behaviour("every purpose is kept", async () => {
  for (const purpose of ["fine-tune", "batch", "evals", "user_data"]) assert.equal((await upload(purpose)).purpose, purpose);
});

behaviour("a file is retrieved as it was created", async () => {
  const file = await upload();
  assert.deepEqual(await client.files.retrieve(file.id), file);
});

behaviour("content comes back byte by byte", async () => {
  const bytes = Buffer.alloc(2 ** 20, "0123456789abcdef");
  const file = await upload("user_data", bytes);
  const answer = await client.files.content(file.id);
  assert.ok(Buffer.from(await answer.arrayBuffer()).equals(bytes));
});

behaviour("content is streamed", async () => {
  const file = await upload("user_data", Buffer.alloc(2 ** 21, "x"));
  let size = 0;
  for await (const chunk of (await client.files.content(file.id)).body) size += chunk.length;
  assert.equal(size, 2 ** 21);
});

behaviour("files are listed page by page", async () => {
  for (let number = 0; number < 3; number += 1) await upload("evals");
  const ids = (await all(client.files.list({ purpose: "evals", limit: 2 }))).map((file) => file.id);
  const page = await client.files.list({ purpose: "evals" });
  assert.deepEqual(ids, page.data.map((file) => file.id));
  assert.equal(page.has_more, false);
  assert.equal(new Set(ids).size, ids.length);
});

behaviour("files are listed in either order", async () => {
  await upload("evals");
  const ids = async (order) => (await all(client.files.list({ purpose: "evals", order }))).map((file) => file.id);
  assert.deepEqual(await ids("asc"), (await ids("desc")).reverse());
});

behaviour("a file is deleted", async () => {
  const file = await upload();
  assert.deepEqual(await client.files.delete(file.id), { id: file.id, object: "file", deleted: true });
  await assert.rejects(client.files.retrieve(file.id), OpenAI.NotFoundError);
});

behaviour("a file that a job needs stays", async () => {
  const file = await upload();
  const job = await create({ training_file: file.id });
  await assert.rejects(client.files.delete(file.id), OpenAI.ConflictError);
  await jobs.cancel(job.id);
  assert.equal((await client.files.delete(file.id)).deleted, true);
});

behaviour("a file expires", async () => {
  const file = await upload("user_data", content, "a", { expires_after: { anchor: "created_at", seconds: 3600 } });
  assert.equal(file.expires_at, file.created_at + 3600);
});

behaviour("an expiry out of bounds is refused", async () => {
  const soon = { expires_after: { anchor: "created_at", seconds: 60 } };
  await assert.rejects(upload("user_data", content, "a", soon), OpenAI.BadRequestError);
});

behaviour("waiting for a file", async () => {
  const large = Buffer.concat([content, Buffer.alloc(2 ** 22 + 1, "\n")]);
  const file = await upload("fine-tune", large);
  assert.equal(file.status, "uploaded");
  const ended = await client.files.waitForProcessing(file.id, { pollInterval: 200, maxWait: 60_000 });
  assert.equal(ended.status, "processed");
});

behaviour("a bad training file is refused with its line", async () => {
  await assert.rejects(upload("fine-tune", Buffer.from("not json\n")), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.match(error.message, /line 1/i);
    return true;
  });
});

behaviour("an upload in parts becomes a file", async () => {
  const about = { bytes: content.length, filename: "rows.jsonl", mime_type: "application/jsonl", purpose: "fine-tune" };
  const begun = await client.uploads.create(about);
  assert.equal(begun.status, "pending");
  const half = Math.floor(content.length / 2);
  const second = await client.uploads.parts.create(begun.id, { data: await toFile(content.subarray(half)) });
  const first = await client.uploads.parts.create(begun.id, { data: await toFile(content.subarray(0, half)) });
  assert.equal(first.upload_id, begun.id);
  const md5 = createHash("md5").update(content).digest("hex");
  const done = await client.uploads.complete(begun.id, { part_ids: [first.id, second.id], md5 });
  assert.equal(done.status, "completed");
  const answer = await client.files.content(done.file.id);
  assert.ok(Buffer.from(await answer.arrayBuffer()).equals(content));
});

behaviour("an upload with a wrong md5 is refused", async () => {
  const about = { bytes: content.length, filename: "a", mime_type: "text/plain", purpose: "user_data" };
  const begun = await client.uploads.create(about);
  const part = await client.uploads.parts.create(begun.id, { data: await toFile(content) });
  const wrong = { part_ids: [part.id], md5: "0".repeat(32) };
  await assert.rejects(client.uploads.complete(begun.id, wrong), OpenAI.BadRequestError);
});

behaviour("an upload is cancelled", async () => {
  const begun = await client.uploads.create({ bytes: 1, filename: "a", mime_type: "text/plain", purpose: "user_data" });
  assert.equal((await client.uploads.cancel(begun.id)).status, "cancelled");
});

behaviour("a job is created with a method", async () => {
  const hyperparameters = { n_epochs: 2, batch_size: "auto", learning_rate_multiplier: 0.5 };
  const job = await create({ method: { type: "supervised", supervised: { hyperparameters } }, training: undefined });
  assert.equal(job.object, "fine_tuning.job");
  assert.equal(job.status, "queued");
  assert.deepEqual(job.hyperparameters, hyperparameters);
  assert.deepEqual(job.method.supervised.hyperparameters, hyperparameters);
});

behaviour("a job is created with the deprecated hyperparameters", async () => {
  const job = await create({ hyperparameters: { n_epochs: 3 }, training: undefined });
  assert.equal(job.hyperparameters.n_epochs, 3);
});

behaviour("a job is created with suffix, seed, metadata and integrations", async () => {
  const metadata = tags();
  const integrations = [{ type: "wandb", wandb: { project: "p", tags: ["a"] } }];
  const job = await create({ suffix: "node", seed: 5, metadata, integrations, validation_file: (await upload()).id });
  assert.equal(job.seed, 5);
  assert.deepEqual(job.metadata, metadata);
  assert.equal(job.integrations[0].wandb.project, "p");
});

behaviour("choices of ours pass through", async () => {
  const job = await create({ training: { max_steps: 9 } });
  assert.equal(job.anneal.training.max_steps, 9);
});

behaviour("an unknown choice is refused by name", async () => {
  await assert.rejects(create({ trainning: {} }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "trainning");
    assert.equal(error.code, "unknown_parameter");
    assert.match(error.requestID, /^req_/);
    return true;
  });
});

behaviour("jobs are listed page by page", async () => {
  const metadata = tags();
  const made = [];
  for (let number = 0; number < 5; number += 1) made.unshift((await create({ metadata })).id);
  const listed = await all(jobs.list({ limit: 2, metadata }));
  assert.deepEqual(listed.map((job) => job.id), made);
});

behaviour("a job is retrieved, paused, resumed and cancelled", async () => {
  const job = await create();
  assert.equal((await jobs.retrieve(job.id)).id, job.id);
  assert.equal((await jobs.pause(job.id)).status, "paused");
  assert.equal((await jobs.resume(job.id)).status, "queued");
  assert.equal((await jobs.cancel(job.id)).status, "cancelled");
  await assert.rejects(jobs.resume(job.id), OpenAI.ConflictError);
});

behaviour("a conflict is not retried", async () => {
  const job = await create();
  await jobs.cancel(job.id);
  let asked = 0;
  const counting = new OpenAI({ baseURL, apiKey, fetch: (url, init) => ((asked += 1), fetch(url, init)) });
  await assert.rejects(counting.fineTuning.jobs.cancel(job.id), OpenAI.ConflictError);
  assert.equal(asked, 1);
});

behaviour("events are listed page by page", async () => {
  const ids = (await all(jobs.listEvents(finished.id, { limit: 4 }))).map((event) => event.id);
  const whole = await jobs.listEvents(finished.id, { limit: 1000 });
  assert.deepEqual(ids, whole.data.map((event) => event.id));
  assert.equal(whole.data[0].message, "The job has successfully completed");
});

behaviour("checkpoints are listed", async () => {
  const checkpoints = await all(jobs.checkpoints.list(finished.id, { limit: 2 }));
  assert.deepEqual(checkpoints.map((one) => one.step_number), [6, 4, 2]);
  assert.ok(checkpoints.every((one) => one.metrics.full_valid_loss > 0));
});

behaviour("a finished job is read as Python reads it", async () => {
  assert.deepEqual(await jobs.retrieve(finished.id), finished);
});

behaviour("a failed job says why", async () => {
  const job = await jobs.retrieve(broken);
  assert.equal(job.status, "failed");
  assert.equal(job.error.code, "invalid_training_file");
});

behaviour("the result file is read", async () => {
  const text = await (await client.files.content(finished.result_files[0])).text();
  assert.equal(text.split(/\r?\n/)[0], "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy");
});

behaviour("models are listed", async () => {
  const ids = (await all(client.models.list())).map((one) => one.id);
  assert.ok(ids.includes(model));
  assert.ok(ids.includes(finished.fine_tuned_model));
});

behaviour("models are retrieved by names with slashes and colons", async () => {
  for (const name of [model, finished.fine_tuned_model, `${finished.fine_tuned_model}:ckpt-step-2`]) {
    assert.equal((await client.models.retrieve(name)).id, name);
  }
});

behaviour("a base model can not be deleted", async () => {
  await assert.rejects(client.models.delete(model), (error) => [400, 403].includes(error.status));
});

behaviour("failures have their classes", async () => {
  await assert.rejects(client.models.retrieve("no/pe"), OpenAI.NotFoundError);
  await assert.rejects(client.files.list({ limit: 0 }), OpenAI.BadRequestError);
  await assert.rejects(new OpenAI({ baseURL, apiKey: "wrong" }).models.list(), OpenAI.AuthenticationError);
});

behaviour("an answer has a request id", async () => {
  assert.match((await client.models.retrieve(model))._request_id, /^req_/);
});

behaviour("a job whose answer was lost is created once", async () => {
  const [losing, lost] = forgetful("POST", /\/fine_tuning\/jobs$/);
  const metadata = tags();
  const training_file = (await (ready ??= upload())).id;
  const job = await losing.fineTuning.jobs.create({ model, training_file, metadata });
  assert.deepEqual(lost, ["0"]); // and the retry was answered
  assert.deepEqual((await all(jobs.list({ metadata }))).map((one) => one.id), [job.id]);
});

behaviour("a file whose answer was lost is created once", async () => {
  const [losing] = forgetful("POST", /\/files$/);
  const name = `lost-${process.pid}.jsonl`;
  const file = await losing.files.create({ file: await toFile(content, name), purpose: "fine-tune" });
  const ids = (await all(client.files.list())).filter((one) => one.filename === name).map((one) => one.id);
  assert.deepEqual(ids, [file.id]);
});

behaviour("a key creates once", async () => {
  const metadata = tags();
  const training_file = (await (ready ??= upload())).id;
  const options = { idempotencyKey: `node-${metadata.node}`, headers: { "Idempotency-Key": `node-${metadata.node}` } };
  const made = await Promise.all([1, 2, 3].map(() => jobs.create({ model, training_file, metadata }, options)));
  assert.equal(new Set(made.map((job) => job.id)).size, 1);
});

for (const [name, run] of behaviours) {
  let error = null;
  try {
    await run();
  } catch (caught) {
    error = `${caught?.stack ?? caught}`.slice(0, 3000);
  }
  console.log(JSON.stringify({ behaviour: name, error }));
}
