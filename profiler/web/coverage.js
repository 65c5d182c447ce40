// Coverage: which data the page shows, and what is missing from them.

import { el, icon } from "./dom.js";
import { counted, number, safeName, share, span } from "./format.js";

const LOSSES = {
  map_full: "a table in the kernel was full",
  map_busy: "the interrupted code held the lock of a table in the kernel",
  other_tracer: "another BPF program was running on the CPU, as a tracer's: the kernel skips ours",
  draining: "the profiler was emptying its tables in the kernel on that CPU",
  fault: "an error in the profiler; its log has the details",
  spool_full: "the store was unavailable for too long, and the oldest stacks were dropped",
};

const STOPS = {
  root: ["complete", "reached the outermost frame"],
  kernel_thread: ["complete", "kernel threads have no user stack"],
  no_program: ["complete", "the program had ended, or was just being loaded: no user stack"],
  no_user_registers: ["none", "the thread has no user stack"],
  no_process_yet: ["cut", "the process had just started, or the profiler had just discovered it"],
  no_table_yet: ["cut", "the unwind table of a file was not loaded yet"],
  no_table: ["cut", "the file has neither unwind information nor frame pointers"],
  no_room: ["cut", "the memory for unwind tables was full"],
  no_mapping: ["cut", "no mapping is known at the address"],
  hole: ["cut", "the file's unwind information does not cover the function"],
  unsupported_rule: ["cut", "an unwind rule that is not supported"],
  register_lost: ["cut", "an unwind rule that needs a register which only the leaf frame has"],
  bad_frame_pointer: ["cut", "code compiled at run time, without frame pointers"],
  bad_stack_pointer: [
    "cut",
    "the unwind rules led to an invalid address: a damaged or switched stack",
  ],
  chain_end: ["cut", "the chain of frame pointers ended, perhaps too early"],
  unreadable: ["cut", "the stack's memory could not be read"],
  truncated: ["cut", "the stack is deeper than a record can hold; the leaf side is kept"],
  compat: ["cut", "a 32-bit program; only the leaf is kept"],
};

const RUNTIMES = {
  attempts: "samples of threads in programs with an interpreter",
  frames: "functions found on all their stacks",
  no_python: "the thread runs no Python",
  no_state: "the interpreter's state of the thread was not found",
  other_thread: "what was found is not this thread's",
  unreadable: "memory of the interpreter could not be read",
  no_code: "a frame is not of a code object",
  truncated: "there are more frames than a record can hold; the leaf side is kept",
  other_stack: "with functions of another interpreter or of a greenlet, which are not shown",
  unknown_interpreter: "the interpreter was not known yet: its process or its file was new",
};

/** Completeness of the data in one line, with details on demand. */
export class CoverageStrip {
  constructor(container) {
    this.container = container;
  }

  show({ coverage, samples, window }) {
    const isOpen = this.container.querySelector("details")?.open ?? false;
    const lost = sum(coverage.lost);
    const { hosts, skipped } = coverage;
    const facts = [];
    if (coverage.complete !== null && coverage.complete !== undefined) {
      facts.push([share(coverage.complete, 1), "of stacks complete", coverage.complete < 0.9]);
    }
    facts.push([number(lost), `sample${lost === 1 ? "" : "s"} lost`, lost > 0]);
    if (skipped.length)
      facts.push([
        number(skipped.length),
        `object${skipped.length === 1 ? "" : "s"} skipped`,
        true,
      ]);
    facts.push([number(hosts), hosts === 1 ? "host" : "hosts", false]);
    facts.push([number(samples), samples === 1 ? "sample" : "samples", false]);
    const line = facts.map(([figure, noun, isBad]) =>
      el("span", { class: isBad ? "fact bad" : "fact" }, el("b", { text: figure }), ` ${noun}`),
    );
    this.container.replaceChildren(
      el(
        "details",
        { open: isOpen },
        el("summary", {}, ...line, el("span", { class: "more" }, "Details", icon("down"))),
        this.#details(coverage, window),
      ),
    );
  }

  clear() {
    this.container.replaceChildren();
  }

  #details(coverage, window) {
    const { ticks, stored, idle, filtered } = coverage;
    const names = coverage.host_names.slice(0, 12).map(safeName);
    const listed =
      names.join(", ") +
      (coverage.hosts > names.length ? ` and ${coverage.hosts - names.length} more` : "");
    const accounts = [
      ["CPU ticks", ticks],
      ["stored as samples", stored],
      ["idle", idle],
      ["filtered", filtered],
      ["lost", sum(coverage.lost)],
    ].map(([name, count]) => [name, number(count), ticks ? share(count, ticks) : ""]);
    const losses = entries(coverage.lost).map(([cause, count]) => [
      spoken(cause),
      number(count),
      known(LOSSES, cause, ""),
    ]);
    const stops = entries(coverage.stops).map(([reason, count]) => [
      spoken(reason),
      `${number(count)} · ${share(count, stored)}`,
      known(STOPS, reason, ["", ""]).join(": ").replace(/^: $/, ""),
    ]);
    const runtimes = Object.entries(coverage.runtimes ?? {}).flatMap(([name, counts]) =>
      entries(counts).map(([what, count]) => [
        `${spoken(name)}, ${spoken(what)}`,
        number(count),
        known(RUNTIMES, what, ""),
      ]),
    );
    const profiledMs = coverage.profiled_ns / 1e6 / Math.max(1, coverage.hosts);
    const sources = [
      ["Hosts", number(coverage.hosts), listed],
      ["CPUs", number(coverage.cpus ?? 0), ""],
      ["Objects read", number(coverage.objects ?? 0), ""],
      [
        "Window",
        span(window.until_ms - window.from_ms),
        coverage.hosts
          ? `${span(profiledMs)} of it profiled${coverage.hosts > 1 ? ", on average per host" : ""}`
          : "",
      ],
    ];
    return el(
      "div",
      { class: "coverage-details" },
      facts("Where every tick went", accounts),
      coverage.uncounted
        ? el(
            "p",
            {},
            `In ${counted(coverage.uncounted, "window")} the kernel did not let the profiler count ` +
              "the ticks that it skipped beside other BPF programs.",
          )
        : null,
      facts("Why samples were lost", losses.length ? losses : [["no samples were lost", "", ""]]),
      facts("How user stacks end", stops.length ? stops : [["no stacks", "", ""]]),
      runtimes.length ? facts("Frames of runtimes", runtimes) : null,
      facts("Sources", sources),
      coverage.skipped.length
        ? facts(
            "Skipped objects: their samples are missing here",
            coverage.skipped.map(({ key, reason }) => [key, "", reason]),
            "wide",
          )
        : null,
    );
  }
}

function facts(title, rows, className = "") {
  return el(
    "section",
    { class: className },
    el("h3", { text: title }),
    el(
      "table",
      {},
      el(
        "tbody",
        {},
        rows.map(([name, figure, why]) =>
          el(
            "tr",
            {},
            el("th", { scope: "row", text: safeName(name) }),
            el("td", { class: "num", text: figure }),
            el("td", { class: "muted", text: safeName(why) }),
          ),
        ),
      ),
    ),
  );
}

/** Look up a name from outside, which may also be a property of every object. */
function known(table, name, otherwise) {
  return Object.hasOwn(table, name) ? table[name] : otherwise;
}

function spoken(name) {
  return name.replaceAll("_", " ");
}

function entries(counts) {
  return Object.entries(counts)
    .filter(([, count]) => count > 0)
    .sort((one, other) => other[1] - one[1]);
}

function sum(counts) {
  return Object.values(counts).reduce((total, count) => total + count, 0);
}
