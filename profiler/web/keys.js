// Keys: keyboard shortcuts, and the dialog that lists them.

import { button, el, isTyping } from "./dom.js";

const KEYS = [
  [
    "Anywhere",
    [
      ["/", "search"],
      ["n  N", "next, previous match"],
      ["s", "selector"],
      ["t", "timeline"],
      ["g", "graph"],
      ["1  2  3", "graph, table, both"],
      ["i", "inverted or not"],
      ["v", "icicle or flame"],
      ["0", "reset the zoom"],
      ["r", "refresh"],
      ["d", "compare with before, or not"],
      ["b  a  u", "as wide as before, after, both"],
      ["c", "copy a link"],
      ["Escape", "close, let go of the selected box"],
      ["?", "this help"],
    ],
  ],
  [
    "Timeline",
    [
      ["← →", "choose a step"],
      ["Shift ← →", "extend to a range"],
      ["Enter", "show that range"],
      ["Escape", "let go"],
      ["Tab", "go on to the deployments"],
    ],
  ],
  [
    "Graph",
    [
      ["← → ↑ ↓", "go from box to box"],
      ["Enter", "zoom in"],
      ["Escape", "zoom out"],
      ["Home", "show everything"],
    ],
  ],
  [
    "Table",
    [
      ["↑ ↓", "go from row to row"],
      ["Enter", "select the function"],
    ],
  ],
];

/** Fill the help dialog. */
export function showHelp(dialog) {
  dialog.replaceChildren(
    el(
      "div",
      { class: "dialog-head" },
      el("h2", { id: "help-title", text: "Keys" }),
      button({ icon: "close", label: "Close", class: "quiet", click: () => dialog.close() }),
    ),
    el(
      "div",
      { class: "keys" },
      KEYS.map(([title, keys]) =>
        el(
          "section",
          {},
          el("h3", { text: title }),
          el(
            "dl",
            {},
            keys.map(([key, what]) =>
              el(
                "div",
                {},
                el(
                  "dt",
                  {},
                  key.split("  ").map((each) => el("kbd", { text: each })),
                ),
                el("dd", { text: what }),
              ),
            ),
          ),
        ),
      ),
    ),
    el("p", {
      class: "muted",
      text: "Drag over the timeline to look at a part of it. Click a box to zoom into it. Every step is in the address: Back undoes it, and the address can be sent to somebody else.",
    }),
  );
  dialog.showModal();
}

/** Call `actions`, {key: callback}, unless text is being typed or the dialog is open. */
export function bindKeys(actions, dialog) {
  document.addEventListener("keydown", (event) => {
    const isOurs = !event.defaultPrevented && !event.ctrlKey && !event.metaKey && !event.altKey;
    if (!isOurs || isTyping(event) || dialog.open || !Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    actions[event.key]();
  });
}
