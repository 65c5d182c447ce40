// Deployments: how they are described, and the menu that lists them.

import { el } from "./dom.js";
import { counted, number, safeName } from "./format.js";
import { Menu } from "./menu.js";
import { formatTime, zoneName } from "./times.js";
import { badge, verdictText } from "./verdicts.js";

const ANNOUNCE = "everflame deployments add --service NAME --version VERSION";

/** Describe a deployment: `api 1.5.0 (before: 1.4.2), rollout on 3 hosts`. */
export function deploymentText({ service, version, previous, kind, hosts }) {
  const name = [service, version].map(safeName).join(" ");
  return [
    name,
    previous ? ` (previously ${safeName(previous)})` : "",
    `, ${kind}`,
    hosts.length ? ` on ${counted(hosts.length, "host")}` : "",
  ].join("");
}

/** A menu of the deployments in the timeline's window; each compares before and after it. */
export class DeploymentsMenu {
  #shown = null;

  /** `onCompare(deployment)`: one was selected. */
  constructor(container, { onCompare }) {
    this.container = container;
    this.menu = new Menu(container, { onOpen: () => this.#fill() });
    this.count = container.querySelector(".count");
    this.onCompare = onCompare;
  }

  /** Show a response of /api/v1/deployments (null after `problem`); `isChosen` returns whether one is compared. */
  show(response, { tz, problem, isChosen }) {
    this.#shown = { response, tz, problem, isChosen };
    const count = response?.deployments.length ?? 0;
    this.count.textContent = count ? number(count + response.rest) : "";
    if (!this.menu.popup.hidden) this.#fill();
  }

  open() {
    this.menu.open();
  }

  #fill() {
    const { response, tz, problem, isChosen } = this.#shown ?? {};
    const popup = this.menu.popup;
    if (!response)
      return popup.replaceChildren(
        el("p", {
          class: "muted",
          text: problem ? `Cannot list deployments: ${safeName(problem)}` : "Loading…",
        }),
      );
    if (response.deployments.length === 0)
      return popup.replaceChildren(...noDeployments(response.empty?.reason));
    popup.replaceChildren(
      el(
        "ul",
        {},
        response.deployments.map((each) => el("li", {}, this.#choice(each, tz, isChosen(each)))),
      ),
      response.rest
        ? el("p", {
            class: "muted",
            text: `and ${number(response.rest)} earlier ones: select a shorter range to see them`,
          })
        : "",
    );
  }

  #choice(deployment, tz, isChosen) {
    const { first_ms: ms, compare } = deployment;
    return el(
      "button",
      {
        type: "button",
        class: "deployment-choice",
        "aria-current": isChosen ? "true" : null,
        "aria-disabled": compare ? null : "true",
        on: {
          click: () => {
            if (compare) {
              this.menu.close();
              this.menu.button.focus();
            }
            this.onCompare(deployment);
          },
        },
      },
      el("b", { text: deploymentText(deployment) }),
      el("span", { class: "muted", text: `${formatTime(ms, tz)} ${zoneName(tz)}` }),
      el(
        "span",
        { class: "deployment-verdict" },
        badge(deployment),
        el("span", { class: compare ? "" : "muted", text: verdictText(deployment) }),
      ),
    );
  }
}

function noDeployments(reason) {
  const why =
    {
      no_change: "No service changed its version in this range.",
      no_versions: "The versions of these services are not known.",
      nothing_matches: "No service in this range matches the selector.",
      no_data_in_range: "There are no profiles in this range.",
    }[reason] ?? "There are none in this range.";
  return [
    el("p", {}, el("b", { text: "No deployments" })),
    el("p", {
      text: `${why} Versions are read from SERVICE_VERSION and similar variables, image tags and release folders. A deployment pipeline can also announce them:`,
    }),
    el("pre", { text: ANNOUNCE }),
  ];
}
