import assert from "node:assert/strict";
import { test } from "node:test";
import { joined, message, translate } from "../../web/lib/words.mjs";

const KOREAN = {
  "{count} of {total} samplers set": "샘플러 {total}개 중 {count}개 설정됨",
  "{what} from {source}": "{source}의 {what}",
  model: "모델",
};

test("a text without a template is the same in every language", () => {
  assert.equal(translate("model", KOREAN), "model");
  assert.equal(translate(7, KOREAN), "7");
});

test("a template is filled in, in another order where the language has one", () => {
  const text = message("{count} of {total} samplers set", { count: 1, total: 2 });
  assert.equal(translate(text), "1 of 2 samplers set");
  assert.equal(translate(text, KOREAN), "샘플러 2개 중 1개 설정됨");
});

test("values that are texts are translated, names are not", () => {
  const text = message("{what} from {source}", { what: message("model"), source: "model" });
  assert.equal(translate(text, KOREAN), "model의 모델");
});

test("texts in a row are translated one by one", () => {
  const text = joined("\n", [message("model"), "koala.safetensors", message("no translation: {name}", { name: "a" })]);
  assert.equal(translate(text, KOREAN), "모델\nkoala.safetensors\nno translation: a");
});

test("a value may look like a placeholder or like a pattern, and a template like what every object has", () => {
  assert.equal(translate(message("{a} {b} {c}", { a: "{b}", b: "$&" })), "{b} $& {c}");
  assert.equal(translate(message("constructor"), {}), "constructor");
});
