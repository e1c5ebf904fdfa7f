"use strict";
/* Boxes of pictures, without a page: which are hits, where labels go, COCO json.

   A box is {x0, y0, x1, y1, label, ...} in pixels, `label` the index of its class. Detections have
   a `score`, and ground truth may be `crowd`. Both may have a `mask`, a run-length encoding as COCO
   has them, of the picture at any size. `outcomes` is freeanchor/evaluation/outcomes.py. */
const Boxes = (() => {
  const TOUCHING = 0.1; // IoU from which a detection is a poor box of an object, not background
  const MOST_COVERED = 0.2; // of a picture by its labels

  const area = (b) => Math.max(0, b.x1 - b.x0) * Math.max(0, b.y1 - b.y0);

  function overlap(a, b) {
    const width = Math.min(a.x1, b.x1) - Math.max(a.x0, b.x0);
    const height = Math.min(a.y1, b.y1) - Math.max(a.y0, b.y0);
    return width > 0 && height > 0 ? width * height : 0;
  }

  function iou(a, b) {
    const both = overlap(a, b);
    return both ? both / (area(a) + area(b) - both) : 0;
  }

  /* What each detection and each object is: detections "hit", "duplicate", "wrong class",
     "poor box", "background", "ignored" (in a crowd) or null (score below `minScore`), with the
     `object` they hit or else overlap most, -1 for none; objects "hit", "miss" or "crowd". */
  function outcomes(found, truth, minScore, minIou) {
    const objects = truth.map((t) => (t.crowd ? "crowd" : "miss"));
    const result = found.map(() => ({ kind: null, object: -1 }));
    const order = found.map((_, i) => i).filter((i) => found[i].score >= minScore);
    order.sort((i, j) => found[j].score - found[i].score || i - j);
    for (const i of order) {
      const box = found[i];
      let best = -1, bestIou = minIou, near = -1, nearIou = 0, sameIou = 0;
      let isInCrowd = false;
      truth.forEach((t, j) => {
        const isSame = t.label === box.label;
        if (t.crowd) {
          isInCrowd ||= isSame && overlap(box, t) > 0 && overlap(box, t) >= minIou * area(box);
          return;
        }
        const value = iou(box, t);
        if (value > nearIou) [near, nearIou] = [j, value];
        if (!isSame) return;
        sameIou = Math.max(sameIou, value);
        if (objects[j] === "miss" && value >= bestIou && (best < 0 || value > bestIou))
          [best, bestIou] = [j, value];
      });
      let kind = "background";
      if (best >= 0) {
        kind = objects[best] = "hit";
        near = best;
      } else if (isInCrowd) kind = "ignored";
      else if (sameIou >= minIou) kind = "duplicate";
      else if (nearIou >= minIou) kind = "wrong class";
      else if (nearIou >= TOUCHING) kind = "poor box";
      else near = -1;
      result[i] = { kind, object: near };
    }
    return { found: result, truth: objects };
  }

  /* How many of each kind, and F1: 1 where there is neither object nor detection. */
  function count({ found, truth }) {
    const n = { hit: 0, miss: 0, duplicate: 0, "wrong class": 0, "poor box": 0, background: 0 };
    for (const { kind } of found) if (kind in n) n[kind] += 1;
    for (const kind of truth) if (kind === "miss") n.miss += 1;
    n.false = n.duplicate + n["wrong class"] + n["poor box"] + n.background;
    const total = 2 * n.hit + n.false + n.miss;
    n.f1 = total ? (2 * n.hit) / total : 1;
    return n;
  }

  /* Places of labels beside their boxes, so that none hides another one, and as little as can be
     of other objects. `labels` have the box and their size, w and h; the first is placed first.
     Returns a place for each, or null where there is none or the labels would hide the picture. */
  function placeLabels(labels, width, height) {
    const placed = [];
    let free = MOST_COVERED * width * height;
    return labels.map((label) => {
      const { x0, y0, x1, y1, w, h } = label;
      if (w * h > free) return null;
      let best = null;
      [
        [x0, y0 - h], [x1 - w, y0 - h], [x0, y1], [x1 - w, y1], [x1, y0], [x0 - w, y0],
        [x0, y0], [x1 - w, y0], [x0, y1 - h], [x1 - w, y1 - h],
      ].forEach(([left, top], i) => {
        const x = Math.min(Math.max(left, 0), width - w);
        const y = Math.min(Math.max(top, 0), height - h);
        const place = { x0: x, y0: y, x1: x + w, y1: y + h };
        if (x < 0 || y < 0 || placed.some((p) => overlap(p, place) > 0)) return;
        const isOff = Math.abs(x - left) > w / 2 || Math.abs(y - top) > h;
        let cost = i / 50 + (isOff ? 1 : 0);
        for (const other of labels) cost += overlap(other, place) / (w * h);
        if (best === null || cost < best.cost) best = { ...place, cost };
      });
      if (best) {
        placed.push(best);
        free -= w * h;
      }
      return best && { x: best.x0, y: best.y0 };
    });
  }

  /* The runs of a mask down its columns, [x, y, length]; see freeanchor/data/masks.py. */
  function maskRuns({ size: [height], counts }) {
    const lengths = [], runs = [];
    for (let i = 0; i < counts.length; ) {
      let value = 0, shift = 0, code;
      do {
        code = counts.charCodeAt(i++) - 48;
        value |= (code & 31) << shift;
        shift += 5;
      } while (code & 32);
      if (code & 16) value |= -1 << shift;
      lengths.push(lengths.length > 2 ? value + lengths[lengths.length - 2] : value);
    }
    let place = 0;
    lengths.forEach((length, i) => {
      const end = place + length;
      while (i % 2 && place < end) {
        const y = place % height, part = Math.min(end - place, height - y);
        runs.push([Math.floor(place / height), y, part]);
        place += part;
      }
      place = end;
    });
    return runs;
  }

  /* The pixels of a mask as a path of SVG, in pixels of the mask. */
  const maskPath = (mask) =>
    maskRuns(mask).map(([x, y, n]) => `M${x} ${y}h1v${n}h-1z`).join("");

  /* COCO json of the pictures: `classes` are {id, name}, `images` have name, width, height and the
     boxes to write, with masks of their size if with any. */
  function toCoco(classes, images) {
    const round = (x) => Math.round(x * 100) / 100;
    const annotations = [];
    images.forEach((image, i) => {
      for (const b of image.boxes)
        annotations.push({
          id: annotations.length + 1,
          image_id: i + 1,
          category_id: classes[b.label].id,
          bbox: [b.x0, b.y0, b.x1 - b.x0, b.y1 - b.y0].map(round),
          area: b.mask ? maskRuns(b.mask).reduce((sum, [, , n]) => sum + n, 0) : round(area(b)),
          iscrowd: 0,
          score: b.score,
          ...(b.mask && { segmentation: { size: b.mask.size, counts: b.mask.counts } }),
        });
    });
    return {
      images: images.map(({ name, width, height }, i) => ({
        id: i + 1, file_name: name, width, height,
      })),
      annotations,
      categories: classes.map(({ id, name }) => ({ id, name })),
    };
  }

  return { area, count, iou, maskPath, outcomes, overlap, placeLabels, toCoco };
})();
if (typeof module !== "undefined") module.exports = Boxes;
