// @ts-check
// Texts in the canvas's language. A text is made of an English template and its values, in Python (koala/words.py) or
// here; the template is looked up in locales/<language>/main.json only where the text is shown.

/**
 * A text: as it is, a template with its values, or several texts in a row. Values are texts themselves.
 * @typedef {string | number | Message | Joined} Words
 *
 * @typedef {{ template: string, values: Record<string, Words> }} Message
 * @typedef {{ separator: string, parts: Words[] }} Joined
 *
 * English template -> the same in another language.
 * @typedef {Record<string, string>} Translation
 */

/** The entry of a language's main.json that holds its ``Translation``. */
export const ENTRY = "koalaMessages";

/**
 * A text to be translated. ``python3 dev.py generate`` finds its template here, so it has to be written out in the
 * call: message("{count} samplers set", { count }).
 * @param {string} template with a {name} for each value
 * @param {Record<string, Words>} [values]
 * @returns {Message}
 */
export function message(template, values = {}) {
  return { template, values };
}

/**
 * Several texts in a row.
 * @param {string} separator
 * @param {Words[]} parts
 * @returns {Joined}
 */
export function joined(separator, parts) {
  return { separator, parts };
}

/**
 * A text in a language; what has no translation is in English.
 * @param {Words} words
 * @param {Translation} [translation]
 * @returns {string}
 */
export function translate(words, translation = {}) {
  if (typeof words !== "object") return String(words);
  if ("parts" in words) return words.parts.map((part) => translate(part, translation)).join(words.separator);
  const template = Object.hasOwn(translation, words.template) ? translation[words.template] : words.template;
  return template.replace(/\{(\w+)\}/g, (found, name) =>
    Object.hasOwn(words.values, name) ? translate(words.values[name], translation) : found,
  );
}
