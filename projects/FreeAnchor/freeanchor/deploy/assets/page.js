"use strict";
/* Pictures go to the server one after another; what is shown of the answers is decided here. */
(() => {
  const MOST_TRIES = 20;
  const at = (id) => document.getElementById(id);
  const url = new URLSearchParams(location.hash.slice(1)).get("token");
  if (url) {
    sessionStorage.setItem("token", url);
    history.replaceState(null, "", location.pathname); // not to be seen, copied or remembered
  }
  let model = null, viewer = null, total = 0, done = 0, isSending = false;
  const waiting = [];

  const sleep = (seconds) => new Promise((ready) => setTimeout(ready, 1000 * seconds));

  /* What the server answers; where it has no room, the same is asked again later. */
  async function ask(path, options = {}) {
    for (let tries = 1; ; tries++) {
      const headers = { ...options.headers };
      const token = sessionStorage.getItem("token");
      if (token) headers.Authorization = `Bearer ${token}`;
      let response;
      try {
        response = await fetch(path, { ...options, headers });
      } catch {
        throw new Error("the server does not answer");
      }
      if ([429, 503].includes(response.status) && tries < MOST_TRIES) {
        await sleep(Number(response.headers.get("Retry-After")) || 1);
        continue;
      }
      const answer = await response.json().catch(() => ({}));
      if (response.status === 401) {
        at("ask-token").hidden = false;
        at("token").focus();
      }
      if (!response.ok) throw new Error(answer.error || `the server answers ${response.status}`);
      return answer;
    }
  }

  /* The browser's type of a file is that of its name: what it is, the server finds out. */
  const send = (path, file) =>
    ask(path, {
      method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" },
    });

  async function bag(image, run, box) {
    const query = new URLSearchParams({
      x: Math.max(0, box.x0), y: Math.max(0, box.y0),
      width: Math.max(1, box.x1 - box.x0), height: Math.max(1, box.y1 - box.y0),
      category_id: viewer.data.classes[box.label].id,
    });
    const answer = await send(`api/bag?${query}`, image.file);
    const row = (name) => ({ bbox: [x, y, w, h], ...values }) => [x, y, x + w, y + h, values[name]];
    return { anchors: answer.bag.map(row("prob")), assigned: answer.assigned.map(row("iou")) };
  }

  function tell(text) {
    at("status").textContent = text;
  }

  function complain(name, error) {
    const item = document.createElement("li");
    item.textContent = `${name}: ${error.message}`;
    at("errors").append(item);
  }

  /* Remove all pictures. */
  function clear() {
    for (const { image } of viewer?.cards ?? []) URL.revokeObjectURL(image.src);
    viewer?.clear();
    at("viewer").hidden = at("actions").hidden = at("hint").hidden = true;
  }

  async function start() {
    try {
      model = await ask("api/model");
    } catch (error) {
      tell(error.message);
      return;
    }
    at("ask-token").hidden = true;
    tell("");
    document.title = `FreeAnchor: ${model.categories.length} classes`;
    const { max_bytes, max_pixels } = model.limits;
    at("limits").textContent = `, up to ${max_bytes / 1e6} MB and ${max_pixels / 1e6} million pixels`;
    clear(); // of a model that was served before, whose token is no longer right
    at("viewer").replaceChildren();
    const data = { classes: model.categories, runs: [""], images: [] };
    viewer = new Viewer(at("viewer"), data, {
      score: model.score, canDraw: model.bags, bag: model.bags ? bag : null, hasMasks: model.masks,
    });
    work();
  }

  async function detect(file) {
    if (file.size > model.limits.max_bytes)
      throw new Error(`the file has more than ${model.limits.max_bytes / 1e6} MB`);
    const { width, height, detections } = await send("api/detect", file);
    const index = new Map(model.categories.map(({ id }, i) => [id, i]));
    const found = detections.map(({ bbox: [x, y, w, h], category_id, score, segmentation }) => [
      x, y, x + w, y + h, index.get(category_id), score, segmentation,
    ]);
    const src = URL.createObjectURL(file);
    viewer.add({ name: file.name, file, width, height, src, truth: null, found: [found] });
    at("viewer").hidden = at("actions").hidden = false;
    at("hint").hidden = !model.bags;
  }

  async function work() {
    if (isSending || !viewer) return;
    isSending = true;
    while (waiting.length) {
      const file = waiting.shift();
      tell(`Picture ${done + 1} of ${total}: ${file.name}`);
      try {
        await detect(file);
      } catch (error) {
        complain(file.name, error);
      }
      done += 1;
    }
    tell(total ? `${total === 1 ? "The picture is" : `All ${total} pictures are`} done.` : "");
    total = done = 0;
    isSending = false;
  }

  function take(files) {
    at("errors").replaceChildren();
    waiting.push(...files);
    total += files.length;
    work();
  }

  at("files").addEventListener("change", () => {
    take([...at("files").files]);
    at("files").value = "";
  });
  for (const type of ["dragover", "dragleave", "drop"])
    document.addEventListener(type, (event) => {
      event.preventDefault();
      at("drop").classList.toggle("over", type === "dragover");
      if (type === "drop" && event.dataTransfer.files.length) take([...event.dataTransfer.files]);
    });
  at("ask-token").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem("token", at("token").value.trim());
    start();
  });
  at("download").addEventListener("click", () => {
    const text = JSON.stringify(viewer.toCoco(), null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "detections.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  at("clear").addEventListener("click", () => {
    clear();
    at("files").focus();
  });
  start();
})();
