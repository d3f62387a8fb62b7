// @ts-check
// The command "Swap U-Net for KOALA", and what follows from another choice in KOALA U-Net Swap.

import { ADAPTER, controlsOf } from "./controls.mjs";
import { addBelow, asOneStep, create, setWidget } from "./edit.mjs";
import { isBeside, isStock, merge, replace } from "./exchange.mjs";
import { connect, spot } from "./links.mjs";
import { allBranches, follow, isBehind, isKoala, isMerge, SWAP } from "./models.mjs";
import { alsoChanged, distinct, inPlace, noSampler, placements, placeSwaps, startOf } from "./placing.mjs";
import { isGuider, samplersAt, samplersOf, widgetOf } from "./samplers.mjs";
import { apply, plan, report } from "./settings.mjs";
import { joined, message } from "./words.mjs";

/**
 * @import { Control } from "./controls.mjs"
 * @import { Branch, Kind, Wire } from "./models.mjs"
 * @import { Placed } from "./placing.mjs"
 * @import { Settings, Taker } from "./samplers.mjs"
 * @import { Words } from "./words.mjs"
 *
 * What a person is told.
 * @typedef {{ severity: "success" | "info" | "warn" | "error", words: Words }} Notice
 */

const [FILE, NONE] = ["unet_name", ""];

/**
 * Swap the U-Net of nodes' MODELs, set the samplers behind as KOALA was published, and put KOALA ControlNet behind
 * their ControlNets: one step for undo.
 * @param {ComfyApp} app
 * @param {ComfyNode[]} nodes
 * @returns {Notice}
 */
export function swapUNet(app, nodes) {
  const root = app.rootGraph ?? app.canvas.graph;
  const starts = nodes.map((node) => startOf(root, node));
  const wires = distinct(starts.flatMap((start) => start.wires));
  const problems = starts.flatMap(({ problem, koala = [] }) =>
    problem && !changersOf(koala, isStock).length ? [problem] : [],
  );
  const found = placements(wires);
  const koala = [...starts.flatMap((start) => start.koala ?? []), ...behind(wires)];
  const stock = changersOf(koala, isStock);
  if (!found.length && !stock.length) return { severity: "warn", words: joined("\n", problems) };
  const controls = controlsOf(root, takersOf(wires));
  const beside = changersOf(wires, isBeside);
  const ready = inPlace(wires, found);
  if (ready && !controls.length && !beside.length && !stock.length) {
    const [{ title }] = nodes;
    return { severity: "info", words: message('"{node}" is already followed by KOALA U-Net Swap.', { node: title }) };
  }
  const published = settingsByFile();
  /** @type {Words[]} */
  const said = [];
  let smooth = !problems.length;
  asOneStep(app, () => {
    const placed = ready ? undefined : placeSwaps(wires, found, (output, like) => addSwap(output, like, published));
    const file = chosen((placed?.swaps ?? found.flatMap(({ wire }) => wire.swaps))[0]);
    const settings = plan(root, samplersOf(root, takersOf(wires, true), published[file] ?? published[NONE]));
    apply(settings);
    for (const control of controls) adapt(control);
    for (const node of beside) merge(node, create);
    for (const node of stock) replace(node, create);
    const doubts = [...doubtsOf(root, wires), ...others(ready ? [] : alsoChanged(root, wires, found))];
    said.push(
      ...(placed ? swapped(placed, file) : []),
      ...report(settings),
      ...adapted(controls),
      ...merged(beside),
      ...replaced(stock),
      ...doubts,
    );
    smooth &&= !doubts.length && settings.every(({ faults }) => !faults.length) && (ready || /koala/i.test(file));
  });
  return { severity: smooth ? "success" : "warn", words: joined("\n", [...said, ...problems]) };
}

/**
 * Set the samplers behind a swap for another file: those settings that still are what the one before was published
 * with. Nothing is said where nothing changes.
 * @param {ComfyApp} app
 * @param {ComfyNode} swap
 * @param {string} before
 * @returns {Notice | undefined}
 */
export function setForFile(app, swap, before) {
  const root = app.rootGraph ?? app.canvas.graph;
  const published = settingsByFile();
  const [old, now] = [published[before] ?? published[NONE], published[chosen(swap)]];
  if (!now) return undefined;
  const samplers = samplersOf(root, takersOf([follow(root, spot(swap, 0))]), now);
  const settings = plan(root, samplers, (name, value) => value === old[name]);
  if (!settings.some(({ changes }) => changes.length)) return undefined;
  asOneStep(app, () => apply(settings));
  const severity = settings.every(({ faults }) => !faults.length) ? "success" : "warn";
  return { severity, words: joined("\n", report(settings)) };
}

/**
 * Call a function whenever a person chooses another file in a swap, with the one before.
 * @param {ComfyNode} swap
 * @param {(before: string) => void} changed
 */
export function watchFile(swap, changed) {
  const widget = widgetOf(swap, FILE);
  if (!widget) return;
  let known = chosen(swap);
  const { callback } = widget;
  widget.callback = function (value, ...rest) {
    callback?.call(this, value, ...rest);
    const before = known;
    known = chosen(swap);
    if (known !== before && swap.graph) changed(before);
  };
  const { onConfigure } = swap;
  swap.onConfigure = function (...saved) {
    onConfigure?.apply(this, saved);
    known = chosen(swap);
  };
}

/** The file of a swap; NONE where it has none. @param {ComfyNode | undefined} swap */
function chosen(swap) {
  return String(widgetOf(swap, FILE)?.value ?? NONE);
}

/**
 * U-Net file -> the settings that it was published with; under NONE, what is most likely.
 * @returns {Record<string, Settings>}
 */
function settingsByFile() {
  return create(SWAP).constructor.nodeData.input.required[FILE][1].koala_published;
}

/**
 * A new swap in an output's graph, set like another one, or with KOALA's first file.
 * @param {Wire} output
 * @param {ComfyNode | undefined} like
 * @param {Record<string, Settings>} published
 */
function addSwap(output, like, published) {
  const swap = create(SWAP);
  const files = Object.keys(published).filter((name) => name !== NONE);
  const file = files.find((name) => /koala/i.test(name)) ?? files[0];
  for (const widget of swap.widgets ?? []) {
    const value = like ? widgetOf(like, widget.name)?.value : widget.name === FILE ? file : undefined;
    if (value !== undefined) setWidget(widget, value);
  }
  addBelow(swap, output);
  return swap;
}

/**
 * What takes the MODELs once they are swapped. ``added``: only what is not behind a swap now.
 * @param {Wire[]} wires
 * @param {boolean} [added]
 * @returns {Taker[]}
 */
function takersOf(wires, added = false) {
  /** @param {Wire[]} below @returns {Branch[]} */
  const taken = (below) =>
    below
      .flatMap(({ branches }) => branches)
      .filter(({ swap }) => !added || !swap)
      .flatMap((branch) => [branch, ...taken(branch.below)]);
  return taken(wires).flatMap(({ kind, node, path }) => (kind === "use" && node ? [{ node, path }] : []));
}

/**
 * Where MODELs go that are KOALA's once they are swapped, behind what takes them.
 * @param {Wire[]} wires
 * @returns {Wire[]}
 */
function behind(wires) {
  return allBranches(wires).flatMap(({ kind, below }) => (kind === "use" ? below : []));
}

/**
 * The nodes of a kind among those that change MODELs, each once.
 * @param {Wire[]} wires
 * @param {(node: ComfyNode) => boolean} condition
 */
function changersOf(wires, condition) {
  const nodes = allBranches(wires).flatMap(({ kind, node }) => (kind === "change" && node ? [node] : []));
  return [...new Set(nodes)].filter(condition);
}

/** @param {Control} control */
function adapt({ from, to }) {
  const adapter = create(ADAPTER);
  addBelow(adapter, from);
  connect(from, spot(adapter, 0));
  for (const input of to) connect(spot(adapter, 0), input);
}

// --- words ---------------------------------------------------------------------------------------------------------

/** @param {Placed} placed @param {string} file @returns {Words[]} */
function swapped({ added, moved }, file) {
  const said = [];
  if (added.length === 1) said.push(file ? message("{file} in place", { file }) : message("KOALA U-Net Swap in place"));
  if (added.length > 1)
    said.push(
      message("{count} times KOALA U-Net Swap in place, one for each MODEL that is sampled", { count: added.length }),
    );
  if (moved.length) said.push(message("KOALA U-Net Swap moved behind what changes SDXL's MODEL"));
  if (!file)
    said.push(
      message(
        "models/diffusion_models has no U-Net yet: put KOALA's there, press R, and choose it in KOALA U-Net Swap",
      ),
    );
  else if (!/koala/i.test(file))
    said.push(message("no file has KOALA in its name: choose KOALA's U-Net in KOALA U-Net Swap"));
  return said;
}

/** @param {Control[]} controls @returns {Words[]} */
function adapted(controls) {
  const names = controls.map(
    ({ from: { graph, id, slot } }) => graph.getNodeById(id)?.title ?? graph.inputs?.[slot].name ?? ADAPTER,
  );
  return names.length ? [message("KOALA ControlNet put behind {nodes}", { nodes: listed(names) })] : [];
}

/** @param {ComfyNode[]} loaders @returns {Words[]} */
function merged(loaders) {
  const nodes = listed(loaders.map(({ title }) => title));
  return loaders.length
    ? [message("merges its LoRA into the weights now, so that it is carried over: {nodes}", { nodes })]
    : [];
}

/** @param {ComfyNode[]} loaders @returns {Words[]} */
function replaced(loaders) {
  const nodes = listed(loaders.map(({ title }) => title));
  return loaders.length ? [message("KOALA LoRA Loader put in the place of {nodes}", { nodes })] : [];
}

/** @param {ComfyNode[]} uses @returns {Words[]} */
function others(uses) {
  const nodes = listed(uses.map(({ title }) => title));
  return uses.length ? [message("changed as well, being the same subgraph: {nodes}", { nodes })] : [];
}

/**
 * What the swap cannot vouch for.
 * @param {ComfyGraph} root
 * @param {Wire[]} wires
 * @returns {Words[]}
 */
function doubtsOf(root, wires) {
  const branches = allBranches(wires);
  /** @param {Kind} kind @param {(taker: Taker) => boolean} condition */
  const titles = (kind, condition) =>
    branches.flatMap(({ kind: found, node, path }) =>
      found === kind && node && condition({ node, path }) ? [node.title] : [],
    );
  const left = titles("change", ({ node }) => isBehind(node));
  const merges = titles("change", ({ node }) => isMerge(node));
  const unknown = titles("change", ({ node }) => isForeign(node));
  const idle = branches.flatMap(({ kind, node, path }) =>
    kind === "use" && node && isGuider(node) && !samplersAt(root, { node, path }).length ? [node] : [],
  );
  const users = titles("use", (taker) => isForeign(taker.node) && !isGuider(taker.node) && !samplersAt(root, taker).length);
  return [
    ...(left.length ? [message("left out by the swap, to be put behind it: {nodes}", { nodes: listed(left) })] : []),
    ...(merges.length
      ? [message("left out by the swap, as it mixes SDXL's weights: {nodes}", { nodes: listed(merges) })]
      : []),
    ...(unknown.length
      ? [
          message("not known: {nodes}; KOALA U-Net Swap says after a run what it carried over", {
            nodes: listed(unknown),
          }),
        ]
      : []),
    ...[...new Set(idle)].map(noSampler),
    ...(users.length ? [message("not known: what {nodes} does with the MODEL", { nodes: listed(users) })] : []),
  ];
}

/** Whether a node is another pack's. @param {ComfyNode} node */
function isForeign(node) {
  return !isKoala(node) && (node.constructor.nodeData?.python_module?.startsWith("custom_nodes.") ?? false);
}

/** @param {string[]} names */
function listed(names) {
  return [...new Set(names)].map((name) => `"${name}"`).join(", ");
}
