// Theme: light, dark or the system's; the browser remembers the choice.

const KEY = "everflame-theme";
const LABELS = {
  auto: "Theme: system",
  light: "Theme: light",
  dark: "Theme: dark",
};
const THEMES = Object.keys(LABELS);

/** Apply the remembered theme; the button switches to the next one. `onChange()` is called after both. */
export function bindTheme(button, onChange) {
  const show = (theme) => {
    write(theme);
    const { dataset } = document.documentElement;
    if (theme === "auto") delete dataset.theme;
    else dataset.theme = theme;
    button.setAttribute("aria-label", LABELS[theme]);
    button.title = LABELS[theme];
    onChange();
  };
  button.addEventListener("click", () =>
    show(THEMES[(THEMES.indexOf(read()) + 1) % THEMES.length]),
  );
  show(read());
}

function read() {
  try {
    const theme = localStorage.getItem(KEY);
    return THEMES.includes(theme) ? theme : "auto";
  } catch {
    return "auto"; // storage may be forbidden
  }
}

function write(theme) {
  try {
    localStorage.setItem(KEY, theme);
  } catch {
    // Without storage the choice lasts as long as the page.
  }
}
