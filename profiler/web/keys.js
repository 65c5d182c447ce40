// Keys: keyboard shortcuts, and the dialog that lists them.

import { button, el, isTyping } from "./dom.js";

const KEYS = [
  [
    "Everywhere",
    [
      ["/", "search"],
      ["n  N", "next, previous match"],
      ["s", "go to the selector"],
      ["f", "show the fleet, or the graph"],
      ["t", "go to the timeline"],
      ["g", "go to the graph, or the list"],
      ["1  2  3", "show graph, table, both"],
      ["1  2  3  4", "fleet: services, versions, modules, functions"],
      ["i", "invert"],
      ["v", "switch icicle and flame"],
      ["0", "reset the zoom"],
      ["r", "refresh"],
      ["d", "start or end a comparison"],
      ["b  a  u", "box widths: before, after, union"],
      ["c", "copy a link"],
      ["Escape", "close, clear the selection"],
      ["?", "show this help"],
    ],
  ],
  [
    "Timeline",
    [
      ["← →", "select a step"],
      ["Shift ← →", "extend the selection"],
      ["Enter", "show the selected range"],
      ["Escape", "clear the selection"],
      ["Tab", "go to the deployments"],
    ],
  ],
  [
    "Graph",
    [
      ["← → ↑ ↓", "move between boxes"],
      ["Enter", "zoom in"],
      ["Escape", "zoom out"],
      ["Home", "reset the zoom"],
    ],
  ],
  [
    "Table",
    [
      ["↑ ↓", "move between rows"],
      ["Enter", "select the function, or open the row's flame graph"],
    ],
  ],
];

/** Fill the help dialog. */
export function showHelp(dialog) {
  dialog.replaceChildren(
    el(
      "div",
      { class: "dialog-head" },
      el("h2", { id: "help-title", text: "Keyboard shortcuts" }),
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
      text: "Drag over the timeline to select a part of it. Click a box to zoom into it. The address holds the whole view: Back undoes a step, and the address can be shared as a link.",
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
