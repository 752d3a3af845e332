"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const sign = new Int8Array(bytes(data.sign));
  const logDet = new Float32Array(bytes(data.logDet));
  const carriers = new Uint16Array(bytes(data.carriers));
  const shares = new Uint8Array(bytes(data.shares));
  const { pieces, layers, heads, carriersEach } = data;
  const count = pieces.length;
  const at = (id) => document.getElementById(id);
  const make = (tag, parent, text, name) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (name) node.className = name;
    return parent.appendChild(node);
  };
  const number = (x, digits) => (Number.isFinite(x) ? x.toFixed(digits).replace(/^-(?=0\.0*$)/, "") : x > 0 ? "∞" : "−∞").replace("-", "−");
  const percent = (x) => `${x === 0 || x >= 0.1 ? Math.round(100 * x) : (100 * x).toFixed(1)} %`;

  // A determinant from its sign and logarithm: written by powers of ten, for it may leave the range of numbers.
  function determinant(s, log) {
    if (s === 0) return "0";
    const minus = s < 0 ? "−" : "";
    if (log > -7 && log < 7) return minus + Math.exp(log).toPrecision(3);
    let exponent = Math.floor(log / Math.LN10);
    let digits = Math.exp(log - exponent * Math.LN10).toFixed(2);
    if (digits === "10.00") [digits, exponent] = ["1.00", exponent + 1];
    return `${minus}${digits} × 10^${String(exponent).replace("-", "−")}`;
  }

  // The later tokens of one character show a dot and are named after it. Space before a word and the line end
  // after a token stand outside its mark, or marks would hang over the ends of lines.
  const owner = [];
  pieces.forEach((piece, i) => owner.push(piece === "" && i > 0 ? owner[i - 1] : i));
  const visible = (text) => text.replace(/\r\n|\r|\n/g, "⏎").replace(/\t/g, "⇥").replace(/\p{Cc}/gu, "�");
  const broken = (text) => text.replace(/\r\n|\r|\n/g, "⏎\n").replace(/\t/g, "⇥").replace(/(?!\n)\p{Cc}/gu, "�");
  const blank = pieces.map((piece) => piece.trim() === "");
  const inText = (piece, i) => (piece === "" ? "·" : broken(blank[i] ? piece.replace(/ /g, "␣") : piece.replace(/^ +/, "")));
  const before = (piece, i) => (blank[i] ? "" : piece.match(/^ */)[0]);
  const named = (i) => `${owner[i] === i ? "" : "part of "}“${visible(pieces[owner[i]].replace(/^ +| +$/g, (x) => "␣".repeat(x.length)))}”`;
  const spoken = (i) => `${owner[i] === i ? "" : "part of "}${visible(pieces[owner[i]]).trim() || "space"}`;

  const spans = pieces.map((piece, i) => {
    at("text").append(before(piece, i));
    const text = inText(piece, i);
    const span = make("span", at("text"), text.replace(/\n$/, ""));
    if (text.endsWith("\n")) at("text").append("\n");
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    span.id = `t${i}`;
    span.tabIndex = -1;
    return span;
  });

  make("option", at("layer"), "closest").value = "-1";
  layers.forEach((layer, row) => (make("option", at("layer"), `${layer}`).value = row));
  make("option", at("head"), "closest").value = "-1";
  for (let head = 0; head < heads; head++) make("option", at("head"), `${head}`).value = head;
  at("layer").value = data.worst.row;
  at("head").value = data.worst.head;

  const range = (value, length) => (value < 0 ? [...Array(length).keys()] : [value]);
  const place = (row, head, i) => (row * heads + head) * count + i;
  let shown = []; // of each token: its place in the arrays, for the closest of the layers and heads chosen
  let order = []; // tokens after the first, closest first
  let rank = [];
  let current = 0;

  function chosen() {
    return [range(+at("layer").value, layers.length), range(+at("head").value, heads)];
  }

  function select() {
    const [rows, columns] = chosen();
    let negative = 0;
    shown = pieces.map((_, i) => {
      let best = place(rows[0], columns[0], i);
      for (const row of rows) {
        for (const head of columns) {
          const here = place(row, head, i);
          if (logDet[here] < logDet[best]) best = here;
          if (i > 0 && sign[here] < 0) negative++;
        }
      }
      return best;
    });
    // The first token has no past: its determinant says nothing of the text.
    order = [...Array(count).keys()].slice(1).sort((a, b) => logDet[shown[a]] - logDet[shown[b]] || a - b);
    rank = [];
    order.forEach((i, r) => (rank[i] = r));
    const level = (i) => (i === 0 ? 0 : 3 - [0.02, 0.05, 0.1].filter((q) => rank[i] >= Math.ceil(q * (count - 1))).length);
    spans.forEach((span, i) => {
      const isNegative = i > 0 && sign[shown[i]] < 0;
      span.className = [blank[i] && "blank", level(i) && `level${level(i)}`, isNegative && "negative"].filter(Boolean).join(" ");
      const about = [spoken(i), level(i) && `support token ${rank[i] + 1}`, isNegative && "negative determinant"];
      span.setAttribute("aria-label", about.filter(Boolean).join(", "));
    });
    const barrier = order.map((i) => -logDet[shown[i]]);
    const quantile = (q) => number(barrier[Math.min(barrier.length - 1, Math.floor((1 - q) * barrier.length))], 2);
    const places = (count - 1) * rows.length * columns.length;
    at("figures").textContent =
      `det J < 0 at ${negative} of ${places} places (${percent(negative / places)}). ` +
      `Barrier shown, in nats: median ${quantile(0.5)}, 95 % quantile ${quantile(0.95)}, largest ${quantile(1)}.`;
    describe();
  }

  function describe() {
    const here = shown[current];
    const cell = Math.floor(here / count);
    spans.forEach((span) => span.classList.remove("carrier"));
    const panel = at("token");
    panel.replaceChildren();
    const title = make("p", panel);
    make("b", title, `Token ${current} `);
    make("span", title, named(current), "piece");
    make("span", title, ` layer ${layers[Math.floor(cell / heads)]}, head ${cell % heads}`);
    const first = current === 0;
    const state = first ? "no past to attend to" : sign[here] < 0 ? "past the boundary" : sign[here] === 0 ? "on the boundary" : "";
    const barrier = number(-logDet[here], 3);
    make("p", panel, `Margin det J = ${determinant(sign[here], logDet[here])}${state && ` (${state})`}; barrier −log|det J| = ${barrier} nats` +
      (first ? "" : `; rank ${rank[current] + 1} of ${count - 1}, closest first`));
    const carried = [];
    for (let c = 0; c < carriersEach; c++) {
      const share = shares[here * carriersEach + c] / 255;
      const carrier = carriers[here * carriersEach + c];
      if (share === 0) continue;
      spans[carrier].classList.add("carrier");
      carried.push(`${percent(share)} token ${carrier} ${named(carrier)}`);
    }
    make("p", panel, carried.length ? `Covariance carried by: ${carried.join("; ")}` : "No covariance: nothing varies in what it attends to.");
  }

  function look(i) {
    spans[current].setAttribute("aria-selected", "false");
    spans[current].tabIndex = -1;
    current = i;
    spans[current].setAttribute("aria-selected", "true");
    spans[current].tabIndex = 0;
    describe();
  }

  const index = (event) => spans.indexOf(event.target);
  at("text").addEventListener("mouseover", (event) => index(event) >= 0 && look(index(event)));
  at("text").addEventListener("focusin", (event) => index(event) >= 0 && look(index(event)));
  at("text").addEventListener("click", (event) => index(event) >= 0 && spans[index(event)].focus());
  at("text").addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const along = current === 0 ? -1 : rank[current];
    const next = {
      ArrowLeft: current - 1,
      ArrowRight: current + 1,
      ArrowUp: current === 0 ? order[0] : order[along - 1],
      ArrowDown: order[along + 1],
      Home: 0,
      End: count - 1,
    }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    if (next < 0 || next >= count) return;
    spans[next].focus();
  });
  at("choice").addEventListener("change", select);
  at("choice").addEventListener("submit", (event) => event.preventDefault());

  const table = at("shares");
  const top = make("tr", make("thead", table));
  make("td", top);
  for (let head = 0; head < heads; head++) {
    const name = make("th", top, `${head}`);
    name.scope = "col";
    name.setAttribute("aria-label", `head ${head}`);
  }
  const body = make("tbody", table);
  layers.forEach((layer, row) => {
    const line = make("tr", body);
    const name = make("th", line, `${layer}`);
    name.scope = "row";
    name.setAttribute("aria-label", `layer ${layer}`);
    for (let head = 0; head < heads; head++) {
      const start = place(row, head, 0);
      const share = sign.subarray(start + 1, start + count).filter((s) => s < 0).length / (count - 1);
      const cell = make("td", line, percent(share).slice(0, -2), share ? "some" : "");
      cell.style.setProperty("--share", `${Math.ceil(40 * share)}%`);
      cell.addEventListener("click", () => {
        at("layer").value = row;
        at("head").value = head;
        select();
        at("choice").scrollIntoView();
      });
    }
  });

  select();
  look(order[0]);
})();
