"use strict";
/* Pictures with boxes over them: what is shown is chosen in the page, without asking anybody.

   `data`: classes [{id, name}]; runs [name], whose detections are shown side by side; images
   [{name, width, height, src, truth, found}] with boxes in pixels: `truth` null or a list of
   [x0, y0, x1, y1, label, crowd], `found` a list of [x0, y0, x1, y1, label, score] for each run;
   with a mask at the end if there is one, see boxes.js.
   `options`: score and iou to begin with; bag(image, run, box), a promise of the bag of a box
   {anchors: [[x0, y0, x1, y1, P]], assigned: [[x0, y0, x1, y1, IoU]]} or of null; canDraw;
   hasMasks. */
const Viewer = (() => {
  const { classColor, html, plural } = Dom;
  const ERRORS = ["miss", "wrong class", "duplicate", "poor box", "background"];
  const ERROR_NAMES = ["missed objects", "wrong class", "duplicates", "poor boxes", "background"];
  const KINDS = { hit: "hit", false: "false positive", miss: "miss", truth: "ground truth" };

  function slider(name, value, oninput) {
    const out = html("output", {}, value.toFixed(2));
    const input = html("input", {
      type: "range", min: 0, max: 1, step: 0.01, value, "aria-label": name,
      oninput: () => {
        out.textContent = Number(input.value).toFixed(2);
        oninput(Number(input.value));
      },
    });
    return html("label", { class: "slider" }, `${name} `, out, input);
  }

  function checkbox(name, checked, onchange, attributes = {}) {
    const input = html("input", {
      type: "checkbox", checked, onchange: () => onchange(input.checked),
    });
    return html("label", { class: "check", ...attributes }, input, " ", name);
  }

  class Viewer {
    constructor(root, data, options = {}) {
      Object.assign(this, { root, data, options, cards: [], isDrawing: false, drawnClass: 0 });
      this.hasTruth = Boolean(options.hasTruth);
      this.state = {
        score: options.score ?? 0.5,
        iou: options.iou ?? 0.5,
        labels: true,
        masks: true,
        kinds: { hit: true, false: true, miss: true, truth: false },
        classes: data.classes.map(() => true),
      };
      this.summary = html("p", { class: "summary", role: "status" });
      this.gallery = html("div", { class: `gallery ${data.runs.length > 1 ? "several" : ""}` });
      root.classList.add("fa-viewer");
      root.append(this.tools(), this.summary, this.gallery);
      const seen = new IntersectionObserver(
        (entries) => {
          for (const e of entries) {
            e.target.picture.isSeen = e.isIntersecting;
            if (e.isIntersecting) e.target.picture.draw();
          }
        },
        { rootMargin: "300px" },
      );
      const sized = new ResizeObserver((entries) => {
        for (const e of entries) e.target.picture.redraw();
      });
      this.watch = (picture) => {
        picture.overlay.picture = picture;
        seen.observe(picture.overlay);
        sized.observe(picture.overlay);
      };
      this.unwatch = ({ overlay }) => {
        seen.unobserve(overlay);
        sized.unobserve(overlay);
      };
      for (const image of data.images) this.add(image, false);
      this.update();
      this.sort();
    }

    tools() {
      const change = (key) => (value) => {
        this.state[key] = value;
        this.update();
      };
      const main = html("div", { class: "main" }, slider("Score", this.state.score, change("score")));
      const more = html("div", { class: "more" });
      if (this.hasTruth) {
        main.append(slider("IoU of a hit", this.state.iou, change("iou")));
        for (const [kind, name] of Object.entries(KINDS))
          more.append(
            checkbox(
              html("span", { class: `key ${kind}` }, name),
              this.state.kinds[kind],
              (value) => {
                this.state.kinds[kind] = value;
                this.update();
              },
            ),
          );
      }
      more.append(checkbox("labels", true, change("labels")));
      if (this.options.hasMasks) more.append(checkbox("masks", true, change("masks")));
      if (this.hasTruth) more.append(this.sortTool());
      if (this.options.canDraw) more.append(...this.drawTools());
      return html("form", { class: "tools", "aria-label": "What is shown",
        onsubmit: (e) => e.preventDefault() }, main, more, this.classTools());
    }

    sortTool() {
      const names = [["f1", "F1, lowest first"]];
      if (this.data.runs.length > 1) names.push(["difference", "largest difference"]);
      names.push(...ERRORS.map((key, i) => [key, `most ${ERROR_NAMES[i]}`]), ["name", "name"]);
      const select = html(
        "select",
        { "aria-label": "Sort by", onchange: () => this.sort(select.value) },
        ...names.map(([value, name]) => html("option", { value }, name)),
      );
      return html("label", {}, "Sort by ", select);
    }

    drawTools() {
      const classes = html(
        "select",
        {
          "aria-label": "Class of a drawn box",
          onchange: () => (this.drawnClass = Number(classes.value)),
        },
        ...this.data.classes.map(({ name }, i) => html("option", { value: i }, name)),
      );
      const draw = checkbox("draw a box to see its bag", false, (value) => {
        this.isDrawing = value;
        this.root.classList.toggle("drawing", value);
      });
      return [draw, html("label", {}, "as ", classes)];
    }

    classTools() {
      const boxes = this.data.classes.map(({ name }, i) => {
        const key = html("span", { class: this.hasTruth ? "" : "key found" }, name);
        key.style.setProperty("--color", classColor(i));
        return checkbox(key, true, (value) => {
          this.state.classes[i] = value;
          this.update();
        });
      });
      const all = (value) => () => {
        for (const box of boxes) box.querySelector("input").checked = value;
        this.state.classes.fill(value);
        this.update();
      };
      return html(
        "details",
        { open: boxes.length <= 6 && innerWidth > 600 },
        html("summary", {}, plural(boxes.length, "class", "classes")),
        html(
          "div",
          { class: "classes", role: "group", "aria-label": "Classes that are shown" },
          html("button", { type: "button", onclick: all(true) }, "all"),
          html("button", { type: "button", onclick: all(false) }, "none"),
          ...boxes,
        ),
      );
    }

    /* Show one more picture, and hand on its card. */
    add(image, isLast = true) {
      const pictures = this.data.runs.map((_, run) => new Picture(this, image, run));
      const enlarge = html(
        "button",
        {
          type: "button", class: "enlarge", "aria-pressed": "false",
          "aria-label": `Enlarge ${image.name}`, title: "Enlarge",
          onclick: () => {
            const isLarge = element.classList.toggle("large");
            enlarge.setAttribute("aria-pressed", isLarge);
          },
        },
        "⤢",
      );
      const element = html(
        "figure", {}, html("figcaption", {}, html("b", {}, image.name), enlarge),
        html("div", { class: "runs" }, ...pictures.map((p) => p.element)),
      );
      const card = { image, pictures, element };
      this.cards.push(card);
      this.gallery.append(element);
      pictures.forEach(this.watch);
      if (isLast) this.update();
      return card;
    }

    update() {
      const pictures = this.cards.flatMap((card) => card.pictures);
      for (const picture of pictures) picture.update();
      cancelAnimationFrame(this.frame);
      this.frame = requestAnimationFrame(() => {
        for (const picture of pictures) if (picture.isSeen) picture.draw();
      });
      const names = this.data.runs;
      this.summary.textContent = names
        .map((name, run) => {
          const mine = this.cards.map((card) => card.pictures[run]);
          const sum = (key) => mine.reduce((total, p) => total + p.count[key], 0);
          const head = names.length > 1 ? `${name}: ` : `${plural(mine.length, "picture")}: `;
          if (!this.hasTruth)
            return head + plural(mine.reduce((n, p) => n + p.shown().length, 0), "box", "boxes");
          return `${head}${plural(sum("hit"), "hit")}, ${ERRORS.map(
            (key, i) => `${sum(key)} ${ERROR_NAMES[i]}`,
          ).join(", ")}`;
        })
        .join(" · ");
      this.options.onupdate?.(this);
    }

    sort(by = "f1") {
      if (!this.hasTruth) return;
      const value = ({ image, pictures }) => {
        const [first, second] = pictures.map((p) => p.count);
        if (by === "f1") return first.f1;
        if (by === "difference") return -Math.abs(first.f1 - second.f1);
        return by === "name" ? image.name : -first[by];
      };
      const values = new Map(this.cards.map((card) => [card, value(card)]));
      this.cards.sort((a, b) => {
        const [x, y] = [values.get(a), values.get(b)];
        return x < y ? -1 : x > y ? 1 : 0;
      });
      this.gallery.append(...this.cards.map((card) => card.element));
    }

    /* Remove all pictures. */
    clear() {
      for (const { pictures } of this.cards) pictures.forEach(this.unwatch);
      this.cards = [];
      this.gallery.replaceChildren();
      this.update();
    }

    toCoco() {
      return Boxes.toCoco(
        this.data.classes,
        this.cards.map(({ image, pictures }) => ({ ...image, boxes: pictures[0].shown() })),
      );
    }
  }
  return Viewer;
})();
