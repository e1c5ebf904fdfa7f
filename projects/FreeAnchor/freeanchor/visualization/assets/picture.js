"use strict";
/* One picture with the boxes of one run over it, by mouse, touch, keyboard and screen reader. */
const { Picture, Dom } = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const LABEL_HEIGHT = 15;
  const ERRORS = ["wrong class", "duplicate", "poor box", "background"];
  let count = 0; // of pictures, for the ids of their boxes
  const measure = document.createElement("canvas").getContext("2d");

  function fill(node, attributes, children) {
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value === true) node.setAttribute(key, "");
      else if (value !== false && value !== null) node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  }
  const html = (name, attributes = {}, ...children) =>
    fill(document.createElement(name), attributes, children);
  const svg = (name, attributes = {}, ...children) =>
    fill(document.createElementNS(SVG, name), attributes, children);

  const percent = (x) => `${Math.round(100 * x)} %`;
  const plural = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;
  const toBox = ([x0, y0, x1, y1, label, value, mask = null]) => ({
    x0, y0, x1, y1, label, value, mask,
  });
  const classColor = (label) => `hsl(${(label * 137.5 + 190) % 360} 95% 65%)`;

  class Picture {
    /* One image with the detections of one run. */
    constructor(viewer, image, run) {
      Object.assign(this, { viewer, image, run, active: null, bag: null, draft: null, keys: [] });
      this.id = count++;
      this.found = image.found[run].map(toBox).map((b) => ({ ...b, score: b.value }));
      this.truth = image.truth && image.truth.map(toBox).map((b) => ({ ...b, crowd: b.value }));
      this.overlay = svg("svg", {
        tabindex: 0, role: "listbox", "aria-label": image.name,
        onclick: (e) => this.click(e),
        onkeydown: (e) => this.key(e),
        onpointerover: (e) => this.say(this.entry(e)),
        onpointerdown: (e) => this.drag(e),
      });
      const box = html(
        "div",
        { class: "picture" },
        html("img", { src: image.src, alt: "", draggable: "false" }),
        this.overlay,
      );
      box.style.setProperty("--ratio", image.width / image.height);
      this.caption = html("span");
      this.info = html("p", { class: "info", role: "status" });
      const name = viewer.data.runs.length > 1 ? `${viewer.data.runs[run]}: ` : "";
      this.element = html(
        "div", {}, box,
        html("div", { class: "caption" }, html("b", {}, name), this.caption), this.info,
      );
    }

    /* What is shown: [{key, box, kind, text}], large boxes before the small ones in them. */
    entries() {
      const { state, data } = this.viewer;
      const name = (b) => data.classes[b.label].name;
      const shown = [];
      this.found.forEach((box, i) => {
        const { kind, object } = this.outcomes.found[i];
        if (kind === null || !state.classes[box.label]) return;
        const group = kind === "hit" || !this.truth ? "hit" : kind === "ignored" ? "truth" : "false";
        if (this.truth && !state.kinds[group]) return;
        const what = this.truth ? `, ${kind === "background" ? "nothing there" : kind}` : "";
        const other = kind === "wrong class" ? `, it is ${name(this.truth[object])}` : "";
        const text = `${name(box)}, score ${percent(box.score)}${what}${other}`;
        const label = `${name(box)} ${Math.round(100 * box.score)}`;
        shown.push({ key: `d${i}`, box: { ...box, object }, group, label, text });
      });
      (this.truth || []).forEach((box, i) => {
        const group = this.outcomes.truth[i] === "miss" ? "miss" : "truth";
        if (!state.kinds[group] || !state.classes[box.label]) return;
        const what = { miss: "missed object", crowd: "crowd" }[this.outcomes.truth[i]] || "object";
        const text = `${name(box)}, ${what}`;
        shown.push({ key: `t${i}`, box: { ...box, object: i }, group, label: name(box), text });
      });
      return shown.sort((a, b) => Boxes.area(b.box) - Boxes.area(a.box));
    }

    update() {
      const { state, data } = this.viewer;
      this.outcomes = Boxes.outcomes(this.found, this.truth || [], state.score, state.iou);
      this.count = Boxes.count(this.outcomes);
      this.isStale = true;
      if (this.truth) {
        const n = this.count;
        const errors = ERRORS.filter((k) => n[k]).map((k) => `${n[k]} ${k}`);
        this.caption.textContent =
          `F1 ${n.f1.toFixed(2)} · ${plural(n.hit, "hit")} · ${plural(n.miss, "miss", "misses")} · ` +
          plural(n.false, "false positive") + (errors.length ? ` (${errors.join(", ")})` : "");
        return;
      }
      const shown = this.shown();
      const parts = data.classes
        .map((c, i) => [c.name, shown.filter((b) => b.label === i).length])
        .filter(([, n]) => n);
      this.caption.textContent =
        plural(shown.length, "box", "boxes") +
        (parts.length ? ` · ${parts.map(([name, n]) => `${n} ${name}`).join(" · ")}` : "");
    }

    /* The detections that the score and the classes leave. */
    shown() {
      const { state } = this.viewer;
      return this.found.filter((b) => b.score >= state.score && state.classes[b.label]);
    }

    draw() {
      const width = this.overlay.clientWidth, height = this.overlay.clientHeight;
      if (!width || !this.isStale) return;
      this.isStale = false;
      const scale = width / this.image.width;
      const at = (b) => ({ x0: b.x0 * scale, y0: b.y0 * scale, x1: b.x1 * scale, y1: b.y1 * scale });
      const rect = (b, attributes) => {
        const { x0, y0, x1, y1 } = at(b);
        return svg("rect", { x: x0, y: y0, width: x1 - x0, height: y1 - y0, ...attributes });
      };
      const tint = ({ mask }) => {
        if (!mask || !this.viewer.state.masks) return [];
        mask.path ??= Boxes.maskPath(mask);
        const [rows, columns] = mask.size;
        const transform = `scale(${width / columns} ${height / rows})`;
        return [svg("path", { class: "mask", d: mask.path, transform })];
      };
      this.shownEntries = this.entries();
      if (!this.shownEntries.some((e) => e.key === this.active)) this.active = null;
      this.keys = this.shownEntries.map((e) => e.key);
      this.overlay.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.overlay.setAttribute(
        "aria-label", `${this.image.name}: ${plural(this.keys.length, "box", "boxes")}`,
      );
      this.overlay.replaceChildren();
      for (const { key, box, group, text } of this.shownEntries) {
        const isActive = key === this.active;
        const node = svg(
          "g",
          {
            class: `box ${this.truth ? group : "found"}${isActive ? " active" : ""}`,
            role: "option", id: `fa-${this.id}-${key}`, "data-key": key, "aria-label": text,
            "aria-selected": isActive,
          },
          ...tint(box),
          rect(box, { class: "halo" }),
          rect(box, { class: "line" }),
        );
        if (!this.truth) node.style.setProperty("--color", classColor(box.label));
        this.overlay.append(node);
      }
      if (this.active) this.overlay.setAttribute("aria-activedescendant", `fa-${this.id}-${this.active}`);
      else this.overlay.removeAttribute("aria-activedescendant");
      this.overlay.classList.toggle("faint", this.bag !== null);
      if (this.bag) this.drawBag(rect);
      if (this.draft) this.overlay.append(rect(this.draft, { class: "draft" }));
      if (this.viewer.state.labels && !this.bag) this.drawLabels(at, width, height);
    }

    drawLabels(at, width, height) {
      const rank = (e) => (e.key === this.active ? 2 : (e.box.score ?? 1));
      const entries = this.shownEntries.slice().sort((a, b) => rank(b) - rank(a));
      measure.font = "11px system-ui, sans-serif";
      const labels = entries.map((e) => ({
        ...at(e.box), w: measure.measureText(e.label).width + 6, h: LABEL_HEIGHT,
      }));
      Boxes.placeLabels(labels, width, height).forEach((place, i) => {
        if (!place) return;
        const { group, label, box, key } = entries[i];
        const node = svg(
          "g",
          { class: `label ${this.truth ? group : "found"}`, "aria-hidden": "true", "data-key": key },
          svg("rect", { x: place.x, y: place.y, width: labels[i].w, height: LABEL_HEIGHT, rx: 2 }),
          svg("text", { x: place.x + 3, y: place.y + 11 }, label),
        );
        if (!this.truth) node.style.setProperty("--color", classColor(box.label));
        this.overlay.append(node);
      });
    }

    drawBag(rect) {
      const { anchors, assigned, box } = this.bag;
      const best = Math.max(...anchors.map((a) => a[4]), 1e-30);
      for (const anchor of assigned)
        this.overlay.append(rect(toBox(anchor), { class: "anchor assigned" }));
      for (const anchor of anchors.slice().sort((a, b) => a[4] - b[4])) {
        const value = anchor[4] / best;
        this.overlay.append(
          rect(toBox(anchor), {
            class: "anchor", stroke: `hsl(${260 - 205 * value} 90% ${35 + 25 * value}%)`,
            "stroke-width": value === 1 ? 3 : 0.6 + value,
          }),
        );
      }
      this.overlay.append(rect(box, { class: "object" }));
    }

    entry(event) {
      const key = event.target.closest("[data-key]")?.dataset.key;
      return this.shownEntries?.find((e) => e.key === key) ?? null;
    }

    say(entry) {
      if (entry && entry.key !== this.active && !this.bag && !this.draft) this.info.textContent = entry.text;
    }

    redraw() {
      this.isStale = true;
      this.draw();
    }

    click(event) {
      if (this.viewer.isDrawing) return;
      const entry = this.entry(event);
      this.active = entry && entry.key;
      if (entry) this.askBag(entry.box, entry.text);
      else this.clear();
    }

    clear() {
      this.bag = this.draft = this.active = null;
      this.info.textContent = "";
      this.redraw();
    }

    async askBag(box, text) {
      this.bag = null;
      this.info.textContent = text;
      this.redraw();
      if (!this.viewer.options.bag) return;
      const asked = (this.asked = {});
      try {
        const bag = await this.viewer.options.bag(this.image, this.run, box);
        if (this.asked !== asked || !bag) return;
        this.bag = { box, ...bag };
        const best = Math.max(0, ...bag.anchors.map((a) => a[4]));
        this.info.textContent =
          `${text} · its bag: ${plural(bag.anchors.length, "anchor")}, the best (thick) with ` +
          `P = ${best.toPrecision(2)}; RetinaNet's rule gives it ` +
          `${plural(bag.assigned.length, "anchor")} (dashed). Escape goes back.`;
      } catch (error) {
        this.info.textContent = `${text} · ${error.message}`;
      }
      this.redraw();
    }

    key(event) {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") this.clear();
      else if (this.draft && (step || event.key === "Enter")) this.keyDraft(event);
      else if (event.key === "b" && this.viewer.options.canDraw) {
        const { width, height } = this.image;
        this.draft = { x0: width / 4, y0: height / 4, x1: width / 2, y1: height / 2 };
        this.bag = null;
        this.info.textContent =
          "A box: arrow keys move it, with shift they change its size, Enter shows its bag.";
        this.redraw();
      } else if (event.key === "Enter" || event.key === " ") {
        const entry = this.shownEntries.find((e) => e.key === this.active);
        if (entry) this.askBag(entry.box, entry.text);
      } else if (step || event.key === "Home" || event.key === "End") {
        const last = this.keys.length - 1, now = this.keys.indexOf(this.active);
        const next = { Home: 0, End: last }[event.key] ?? now + step;
        this.active = this.keys[now < 0 && step < 0 ? last : (next + last + 1) % (last + 1)] ?? null;
        this.bag = null;
        this.redraw();
        const entry = this.shownEntries.find((e) => e.key === this.active);
        this.info.textContent = entry ? entry.text : "";
      } else return;
      event.preventDefault();
    }

    keyDraft(event) {
      const d = this.draft, { width, height } = this.image;
      if (event.key === "Enter") return this.askDraft();
      const x = { ArrowRight: 1, ArrowLeft: -1 }[event.key] * (width / 50) || 0;
      const y = { ArrowDown: 1, ArrowUp: -1 }[event.key] * (height / 50) || 0;
      const moved = { x0: d.x0, y0: d.y0, x1: d.x1 + x, y1: d.y1 + y };
      if (!event.shiftKey) [moved.x0, moved.y0] = [d.x0 + x, d.y0 + y];
      const isInside = moved.x0 >= 0 && moved.y0 >= 0 && moved.x1 <= width && moved.y1 <= height;
      if (isInside && moved.x1 - moved.x0 > 1 && moved.y1 - moved.y0 > 1) this.draft = moved;
      this.redraw();
    }

    askDraft() {
      const box = { ...this.draft, label: this.viewer.drawnClass };
      this.draft = null;
      this.askBag(box, `${this.viewer.data.classes[box.label].name}, drawn`);
    }

    drag(event) {
      if (!this.viewer.isDrawing || event.button || !event.isPrimary) return;
      const { left, top } = this.overlay.getBoundingClientRect();
      const scale = this.image.width / this.overlay.clientWidth;
      const inside = (value, limit) => Math.min(Math.max(value * scale, 0), limit);
      const place = (e) => [
        inside(e.clientX - left, this.image.width), inside(e.clientY - top, this.image.height),
      ];
      const [x, y] = place(event);
      const move = (e) => {
        const [u, v] = place(e);
        this.draft = {
          x0: Math.min(x, u), y0: Math.min(y, v), x1: Math.max(x, u), y1: Math.max(y, v),
        };
        this.bag = null;
        this.redraw();
      };
      const listening = new AbortController(), { signal } = listening;
      const end = ({ type }) => {
        listening.abort();
        const d = this.draft;
        if (type === "pointerup" && d && d.x1 - d.x0 > 1 && d.y1 - d.y0 > 1) this.askDraft();
        else this.clear();
      };
      this.overlay.setPointerCapture(event.pointerId);
      this.overlay.addEventListener("pointermove", move, { signal });
      this.overlay.addEventListener("pointerup", end, { signal });
      this.overlay.addEventListener("pointercancel", end, { signal }); // a call comes in
    }
  }

  return { Picture, Dom: { classColor, html, plural } };
})();
