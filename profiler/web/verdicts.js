// Verdicts of deployments: their words, and the badges that show them on marks and in the list.
//
// A badge has a sign and a shape as well as a colour: filled for a verdict, hollow for a provisional
// one, dotted where there is none yet.

import { el } from "./dom.js";
import { growth, safeName } from "./format.js";

/** By urgency: a mark of several deployments shows the first of theirs. */
const VERDICTS = ["regression", "inconclusive", "pending", "improvement", "unchanged", "none"];

/**
 * Return {name, word} of a deployment's verdict: the name is one of VERDICTS, the word is empty for
 * none, and says if it is provisional.
 */
export function verdictOf({ verdict, provisional, pending }) {
  if (verdict) return { name: verdict, word: provisional ? `${verdict} (provisional)` : verdict };
  return pending ? { name: "pending", word: "verdict pending" } : { name: "none", word: "" };
}

/** Return deployments in the order of their verdicts, the most urgent one first. */
export function byUrgency(deployments) {
  const rank = (each) => VERDICTS.indexOf(verdictOf(each).name);
  return deployments.toSorted((one, other) => rank(one) - rank(other));
}

/** Return `regression: parse +52 %, pack new`, why there is no verdict, or "". */
export function verdictText(deployment) {
  const { compare, compare_reason: why, verdict_reason: reason, functions } = deployment;
  const { name, word } = verdictOf(deployment);
  if (name === "none") return safeName((compare ? reason : why) ?? "");
  return [word, functions.map(changeText).join(", ")].filter(Boolean).join(": ");
}

function changeText({ function: name, change, growth: relative }) {
  return `${safeName(name)} ${relative === null ? change : growth(relative)}`;
}

/** Return what shows a verdict; its words stand beside it. Null if there is none. */
export function badge(deployment) {
  const { name } = verdictOf(deployment);
  if (name === "none") return null;
  return el("i", { class: "verdict-badge", "aria-hidden": "true", ...verdictData(deployment) });
}

/** Return the attributes by which deployments.css draws a verdict. */
export function verdictData(deployment) {
  const { name } = verdictOf(deployment);
  return { "data-verdict": name, "data-provisional": deployment.provisional && name !== "none" };
}
