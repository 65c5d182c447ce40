// Fleet: its services, versions, modules or functions, by the cores they use, and by how these have
// grown in a week. A name leads to its flame graph over the same window, a growth to a comparison.

import * as controls from "./controls.js";
import { changeTracker, el } from "./dom.js";
import {
  coreChange,
  coreCount,
  coresUsed,
  counted,
  growth,
  number,
  safeName,
  share,
} from "./format.js";
import { colourClass } from "./scale.js";
import { printState } from "./state.js";
import { Table } from "./table.js";
import { formatWindow } from "./times.js";

const VERSIONS_SHOWN = 3;
const SPLITS = ["", "service", "version", "service,version", "host", "service,host"];
const NOUNS = {
  services: "service",
  versions: "version",
  modules: "module",
  functions: "function",
};
/** The order of most cores first, as the service names it. */
const LARGEST = ["cores", "self"];
const PENDING = "…";
const UNKNOWN = "–";

const byId = (id) => document.getElementById(id);

export class Fleet {
  #page;
  #isNew = changeTracker();
  /** By row, its service and the element with its colour. */
  #swatches = [];

  /** `page` has state, selection and loader, applies changes and makes links of them (page.js). */
  constructor(page) {
    this.#page = page;
    const { change } = page;
    this.table = new Table(byId("fleet-table"), this.#kind({ hosts: 2 }), {
      onSort: (sort) => change({ order: LARGEST.includes(sort) ? "" : sort }),
      onFilter: (filter) => change({ filter }),
      onRows: (rows) => change({ rows }),
      onHover: () => {},
      onSelect: (row) => change(page.selection.graphOf(row)),
    });
    controls.bindChoice(byId("list"), (mode) => change({ mode }));
    controls.bindChoice(byId("order"), (order) => change({ order }));
    controls.bindChoice(byId("split"), (split) => change({ split }));
  }

  /** What the table shows: its response, with the trend if that is there; or null. */
  get response() {
    const { loader } = this.#page;
    const trend = loader.of("trend");
    const isThere = this.#hasTrend && trend.response && !trend.isOld && !trend.error;
    return isThere ? trend.response : loader.of("fleet").response;
  }

  /** Whether the trend has a request of its own. */
  get #hasTrend() {
    return this.#page.selection.fleetSort !== "growth";
  }

  /** Show what depends only on the state. */
  render() {
    const { state, selection } = this.#page;
    const { isFleet } = selection;
    byId("fleet").hidden = !isFleet;
    if (!isFleet) return;
    controls.checkRadio(byId("list"), state.mode);
    const sort = selection.fleetSort;
    controls.checkRadio(byId("order"), LARGEST.includes(sort) ? "" : sort);
    byId("split-pick").hidden = ["services", "versions"].includes(state.mode);
    if (!this.#isNew("split", state.split)) return;
    const splits = SPLITS.includes(state.split) ? SPLITS : [...SPLITS, state.split];
    const options = splits.map((value) => {
      const text = value ? safeName(value.split(",").join(", ")) : "none";
      return el("option", { value, text, selected: value === state.split });
    });
    byId("split").replaceChildren(...options);
  }

  draw() {
    const { state, selection, loader, overview } = this.#page;
    const { response } = this;
    const { error, isOld } = loader.of("fleet");
    if (!selection.isFleet || !response || isOld || error) return;
    const trend = loader.of("trend");
    const isPending = this.#hasTrend && (trend.isOld || !trend.response) && !trend.error;
    const problem = this.#hasTrend ? trend.error : null;
    const { filter, rows } = state;
    const hasColours = state.mode === "services" && state.series === "service";
    const isSame = !this.#isNew("rows", loader.of("fleet").key);
    const shown = [response, printState(state), isPending, problem];
    if (!this.#isNew("table", ...shown)) return this.#paint(overview.colours);
    this.#swatches = [];
    const lines = response.services ?? response.functions;
    const most = Math.max(0, ...lines.map((row) => row.cores));
    this.table.show(lines, {
      all: response.rows,
      sort: selection.fleetSort,
      filter,
      limit: rows,
      kind: this.#kind(response.coverage),
      context: { most, hasColours, isPending, hasTrend: response.week_before !== null },
      isSame,
    });
    this.#paint(overview.colours);
    this.#showSummary(response, { isPending, problem });
  }

  /** Show that the table or its trend is out of date. */
  fail(panel) {
    this.#isNew.forget("table");
    if (panel === "trend") this.draw();
    if (panel === "fleet") this.table.dim(true);
  }

  focusSearch() {
    this.table.filter.focus();
  }

  /** Show that the table waits for another one. */
  wait() {
    const { loader, selection } = this.#page;
    if (!selection.isFleet) return;
    const { isOld, response } = loader.of("fleet");
    const isPending = loader.isPending("fleet") || loader.isPending("status");
    if (response && isOld) this.table.dim(true);
    if (!response) byId("fleet-summary").textContent = isPending ? "Loading…" : "";
  }

  #showSummary(response, { isPending, problem }) {
    const { tz } = this.#page.state;
    const { cores, cores_week_before: before, week_before: week } = response;
    const parts = [el("b", { text: coresUsed(cores) }), " used"];
    if (week) {
      const text =
        before > 0 ? `${growth(cores / before - 1)} (${coreChange(cores - before)})` : "";
      const title = `The same time a week before: ${coresUsed(before)}, ${formatWindow(week.from_ms, week.until_ms, tz)}`;
      parts.push(", ", el("span", { text: `${text} against the week before`, title }));
    } else if (problem)
      parts.push(el("span", { text: `, no trend: ${safeName(problem.message)}` }));
    else if (isPending) parts.push(", loading the week before…");
    else parts.push(", no trend: the store has too little data of the week before");
    byId("fleet-summary").replaceChildren(...parts);
  }

  /** The columns of a list, for responses of /api/v1/fleet/services or /api/v1/fleet/top. */
  #kind({ hosts }) {
    const { mode, split } = this.#page.state;
    const isOfServices = mode === "services" || mode === "versions";
    const noun = NOUNS[mode] ?? NOUNS.services;
    const labels = isOfServices ? [] : split.split(",").filter(Boolean);
    const largest = isOfServices ? "cores" : "self";
    const columns = [
      {
        title: "Cores",
        sort: largest,
        class: "num",
        hint: "CPU seconds per second, of all hosts together",
        cell: (row) => el("td", { class: "num", text: coreCount(row.cores) }),
      },
      {
        title: mode === "functions" ? "Self" : "Share",
        class: "num narrow-less",
        hint: "Part of the CPU time of all that is selected",
        cell: shareCell,
      },
      mode === "functions" && {
        title: "Total",
        sort: "total",
        class: "num optional",
        hint: "Time in the function and its callees, in cores",
        cell: totalCell,
      },
      {
        title: "Change",
        sort: "growth",
        class: "num optional",
        hint: "Cores more or less than at the same time a week before",
        cell: changeCell,
      },
      {
        title: "Growth",
        class: "num growth",
        hint: "Growth since the same time a week before; a click compares the two",
        cell: (row, context) => this.#trendCell(row, context),
      },
      {
        title: capital(noun),
        sort: "name",
        class: "name",
        cell: (row, context) => this.#nameCell(row, context),
      },
      mode === "functions" && {
        title: "Module",
        class: "module optional",
        cell: ({ module }) => textCell(module, "module optional"),
      },
      ...labels.map(labelColumn),
      isOfServices &&
        hosts > 1 && {
          title: "Hosts",
          sort: "hosts",
          class: "num hosts narrow-less",
          hint: "Hosts on which it used CPU time",
          cell: (row) => el("td", { class: "num hosts narrow-less", text: number(row.hosts) }),
        },
      mode === "services" && { title: "Versions", class: "versions optional", cell: versionsCell },
    ].filter(Boolean);
    return {
      id: "fleet-filter",
      label: `${capital(noun)}s of the fleet by CPU time`,
      noun,
      hint: `Filter ${noun}s`,
      none: `No ${noun}s`,
      columns,
      cells: (row, context) => columns.map(({ cell }) => cell(row, context)),
    };
  }

  /** Give services the colours of their layers in the timeline. */
  #paint(colours) {
    for (const [service, swatch] of this.#swatches) {
      swatch.className = `swatch ${colourClass(colours.get(service))}`;
    }
  }

  #nameCell(row, { hasColours }) {
    const { selection, link } = this.#page;
    const name = nameOf(row, this.#page.state.mode);
    const title = this.#page.state.mode === "modules" ? "Its functions" : "Its flame graph";
    const properties = {
      class: "row-name",
      tabindex: "-1",
      text: name,
      title: `${name}: ${title}`,
    };
    const labels = this.#page.selection.fleetLabels.map((each) => safeName(row.labels[each] ?? ""));
    const isSplit = row.function !== undefined && labels.length > 0;
    const swatch = hasColours ? el("i") : null;
    if (swatch) this.#swatches.push([row.labels.service, swatch]);
    return el(
      "td",
      { class: "name" },
      el("span", { class: "named" }, swatch, link(selection.graphOf(row), properties)),
      // In place of columns that a narrow table has no room for.
      isSplit ? el("small", { class: "narrow-only muted", text: labels.join(" ") }) : null,
    );
  }

  #trendCell(row, { isPending, hasTrend }) {
    const { selection, link, state } = this.#page;
    const before = row.cores_week_before;
    if (!hasTrend || before === null) {
      return el("td", { class: "num muted", text: isPending ? PENDING : UNKNOWN });
    }
    if (before === 0) {
      return el("td", { class: "num", text: row.cores > 0 ? "new" : UNKNOWN });
    }
    const text = growth(row.cores / before - 1);
    const title = `${coreCount(before)} → ${coresUsed(row.cores)}. Compare with the same time a week before`;
    const label = `${text}: compare ${nameOf(row, state.mode)} with the week before`;
    const properties = { class: "row-link", tabindex: "-1", text, title, "aria-label": label };
    return el("td", { class: "num" }, link(selection.trendOf(row), properties));
  }
}

function nameOf({ labels, function: name, module }, mode) {
  if (mode === "functions") return safeName(name) || "(no name)";
  if (mode === "modules") return safeName(module) || "(no name)";
  const service = safeName(labels.service ?? "") || "(no service)";
  return mode === "versions" ? `${service} ${safeName(labels.version ?? "") || "–"}` : service;
}

function shareCell(row, { most }) {
  const bar = el("i", { class: "bar", "aria-hidden": "true" });
  bar.style.width = `${most ? (100 * row.cores) / most : 0}%`;
  return el(
    "td",
    { class: "num share narrow-less" },
    bar,
    el("span", { text: share(row.share, 1) }),
  );
}

function totalCell({ total_ns: total, self_ns: self, cores }) {
  const used = self ? (total / self) * cores : 0;
  return el("td", { class: "num optional muted", text: coreCount(used) });
}

function changeCell(row, { isPending, hasTrend }) {
  const before = row.cores_week_before;
  const none = isPending ? PENDING : UNKNOWN;
  const text = hasTrend && before !== null ? coreChange(row.cores - before) : none;
  return el("td", { class: "num optional", text });
}

function versionsCell({ versions, more_versions: more, cpu_ns: all }) {
  const named = versions.slice(0, VERSIONS_SHOWN).map(({ version, cpu_ns: ns }) => {
    const part = versions.length > 1 ? ` ${share(ns, all)}` : "";
    return `${safeName(version) || "(empty)"}${part}`;
  });
  const others = versions.length - named.length + more;
  const text = [...named, ...(others ? [`${number(others)} more`] : [])].join(", ");
  const title = versions.length ? counted(versions.length + more, "version") : null;
  return el("td", { class: "versions optional", text, title: title && `${title}: ${text}` });
}

function labelColumn(name) {
  return {
    title: capital(safeName(name)),
    class: "label narrow-less",
    cell: ({ labels }) => textCell(labels[name] ?? "", "label narrow-less"),
  };
}

function textCell(text, className) {
  return el("td", { class: className, title: safeName(text), text: safeName(text) });
}

function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
