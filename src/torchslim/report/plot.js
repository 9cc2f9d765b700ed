"use strict";
// what the plots of all pages share
const plots = (() => {
  const margin = { l: 58, r: 18, t: 14, b: 48 };

  // plotly reads a few HTML tags in texts; a user's name must stay the text that it is
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  function axis(title, extra) {
    return {
      title: { text: plain(title), standoff: 10, font: { size: 12, color: color("muted") } },
      gridcolor: color("rule"), zeroline: false, linecolor: color("rule"), tickcolor: color("rule"),
      tickfont: { size: 11, color: color("muted") }, fixedrange: true, automargin: false, ...extra,
    };
  }

  function layout(extra) {
    return {
      margin, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false,
      font: { family: getComputedStyle(document.body).fontFamily, color: color("ink"), size: 12 },
      hoverlabel: { bgcolor: color("raised"), bordercolor: color("rule"), font: { color: color("ink"), size: 12 } },
      showlegend: false, ...extra,
    };
  }

  const draw = (element, traces, shape) => Plotly.react(element, traces, shape, { displayModeBar: false });

  // draws now, and again when the window or the colors change
  function keep(all) {
    let waiting = 0;
    const again = () => { clearTimeout(waiting); waiting = setTimeout(all, 80); };
    all();
    addEventListener("resize", again);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  }

  return { margin, plain, color, axis, layout, draw, keep };
})();
