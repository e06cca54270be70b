"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const PAGE = data.runs.length > 1 ? 12 : 24; // rollouts of each run
  const [STEP, IMAGE, NAME, QUESTION, WRITTEN, KIND, AGREEMENT, ENTROPY, REWARD, MAJORITY, ANSWERS, COUNT, BLIND, VOTES, OTHERS] = Array(15).keys();
  document.documentElement.classList.add("scripted");

  // Text of strangers becomes text nodes, and nothing else
  const make = (tag, className, ...children) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children);
    return element;
  };
  const foreign = (tag, className, text) => {
    const element = make(tag, className, text);
    element.dir = "auto";
    return element;
  };
  const percent = (share) => `${Math.round(100 * share)} %`;

  // Charts

  const LEFT = 36 / 330, RIGHT = 322 / 330;
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
  };
  const allSteps = [...new Set(data.runs.flatMap((run) => run.rollouts.map((rollout) => rollout[STEP])))].sort((a, b) => a - b);

  document.querySelectorAll(".plot[data-chart]").forEach((plot) => {
    const { range, lines } = data.charts[plot.dataset.chart];
    const cursor = plot.querySelector(".cursor");
    const readout = plot.parentElement.querySelector(".readout");
    const at = readout.querySelector(".at");
    const values = readout.querySelectorAll("b");
    const last = [...values].map((value) => value.textContent);
    const steps = [...new Set(lines.flatMap((line) => line[0]))].sort((a, b) => a - b);
    let current = null;
    const show = (step) => {
      current = step;
      const share = (step - range[0]) / (range[1] - range[0]);
      cursor.hidden = false;
      cursor.style.left = `${100 * (LEFT + share * (RIGHT - LEFT))}%`;
      at.textContent = `step ${step}`;
      lines.forEach(([x, y], i) => { values[i].textContent = y[nearest(x, step)]; });
    };
    const hide = () => {
      current = null;
      cursor.hidden = true;
      at.textContent = "end";
      values.forEach((value, i) => { value.textContent = last[i]; });
    };
    const point = (event) => {
      const box = plot.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width - LEFT) / (RIGHT - LEFT);
      show(steps[nearest(steps, range[0] + Math.min(1, Math.max(0, share)) * (range[1] - range[0]))]);
    };
    const choose = () => {
      if (current === null || !allSteps.length) return;
      byId("filters").reset();
      setDefaults();
      byId("from").value = byId("to").value = allSteps[nearest(allSteps, current)];
      filter();
      if (!found.some((list) => list.length) && byId("pictured").checked) {
        byId("pictured").checked = false;
        filter();
      }
      byId("gallery").scrollIntoView();
      byId("gallery").focus({ preventScroll: true });
    };
    // A finger reads values, which stay when it is lifted; it scrolls too often by chance to lead elsewhere
    let touched = false;
    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", (event) => { touched = event.pointerType === "touch"; point(event); });
    plot.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") hide(); });
    plot.addEventListener("blur", hide);
    plot.addEventListener("click", () => { if (!touched) choose(); });
    plot.addEventListener("keydown", (event) => {
      const i = current === null ? steps.length - 1 : steps.indexOf(current);
      const to = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: steps.length - 1 }[event.key];
      if (event.key === "Enter") choose();
      else if (event.key === "Escape") hide();
      else if (to !== undefined) show(steps[Math.min(steps.length - 1, Math.max(0, to))]);
      else return;
      event.preventDefault();
    });
  });

  // Filters

  const withPictures = data.runs.map((run) => run.rollouts.some((rollout) => rollout[IMAGE] !== null));
  const anyPicture = withPictures.includes(true);
  let found = [], page = 0;

  const setDefaults = () => {
    byId("pictured").checked = anyPicture;
  };
  const AGREES = {
    any: () => true,
    all: (rollout) => rollout[AGREEMENT] === 1,
    most: (rollout) => rollout[AGREEMENT] >= 0.5 && rollout[AGREEMENT] < 1,
    split: (rollout) => rollout[AGREEMENT] < 0.5 && rollout[MAJORITY] !== null,
    none: (rollout) => rollout[MAJORITY] === null,
  };
  const number = (id, otherwise) => (byId(id).value === "" ? otherwise : Number(byId(id).value));
  const filter = () => {
    const from = number("from", -Infinity), to = number("to", Infinity);
    const agrees = AGREES[byId("agreement").value];
    const kind = byId("kind").value;
    const text = byId("text").value.trim().toLowerCase();
    const pictured = byId("pictured").checked;
    const has = (value) => value !== null && value.toLowerCase().includes(text);
    found = data.runs.map((run, i) => run.rollouts.filter((rollout) =>
      rollout[STEP] >= from && rollout[STEP] <= to && agrees(rollout) && (!kind || rollout[KIND] === kind)
      && (!pictured || !withPictures[i] || rollout[IMAGE] !== null)
      && (!text || has(rollout[QUESTION]) || rollout[ANSWERS].some((answer) => has(answer[0]) || has(answer[1])))));
    page = 0;
    draw();
  };

  // Cards

  const total = (counts) => counts.reduce((sum, count) => sum + count, 0);
  const rewardRange = (low, high) => {
    if (low === null) return "no reward";
    const [from, to] = [low.toFixed(2), high.toFixed(2)];
    return `reward ${from === to ? from : `${from} to ${to}`}`;
  };
  const card = (rollout, run) => {
    const body = make("div", "body");
    const chips = make("div", "chips");
    if (data.runs.length > 1) chips.append(make("b", `badge run${run}`, "AB"[run]));
    chips.append(make("span", "", `step ${rollout[STEP]}`), make("span", "", rollout[KIND]), foreign("span", "", rollout[NAME]));
    if (rollout[WRITTEN] !== null) chips.append(make("span", "warn", "malformed question"));
    body.append(chips, foreign("p", "question clamp", rollout[QUESTION]));
    if (rollout[WRITTEN] !== null) {
      body.append(foreign("p", "written clamp", `The proposer wrote: ${rollout[WRITTEN] || "nothing"}`));
    }
    const votes = make("ul", "votes");
    for (const [answer, count, low, high] of rollout[VOTES]) {
      const bar = make("span", "bar");
      bar.style.width = `${100 * count / rollout[COUNT]}%`;
      const majority = answer !== null && answer === rollout[MAJORITY];
      votes.append(make("li", majority ? "majority" : answer === null ? "unreadable" : "", bar,
        foreign("bdi", "answer", answer === null ? "unreadable" : answer),
        make("span", "count", `${count} of ${rollout[COUNT]} · ${rewardRange(low, high)}`)));
    }
    if (rollout[OTHERS]) {
      const count = rollout[COUNT] - total(rollout[VOTES].map((vote) => vote[1]));
      votes.append(make("li", "others", make("span", "answer", `${rollout[OTHERS]} more ${rollout[OTHERS] > 1 ? "answers" : "answer"}`),
        make("span", "count", `${count} of ${rollout[COUNT]}`)));
    }
    const sum = (label, value) => make("span", "", `${label} `, make("b", "", value));
    const blind = rollout[BLIND] === null ? [] : [make("span", "", "without the image ",
      foreign("bdi", "blind", rollout[BLIND][0] === null ? "unreadable" : rollout[BLIND][0]), ` ${rollout[BLIND][1]} of ${rollout[BLIND][2]}`)];
    body.append(votes, make("p", "sums", sum("agreement", percent(rollout[AGREEMENT])),
      sum("entropy", rollout[ENTROPY].toFixed(2)), sum("proposer’s reward", rollout[REWARD].toFixed(2)), ...blind));
    const list = make("ol");
    const inFull = total(rollout[ANSWERS].map((answer) => answer[3]));
    const which = inFull < rollout[COUNT] ? `${inFull} of the ${rollout[COUNT]}` : `The ${rollout[COUNT]}`;
    const details = make("details", "", make("summary", "", `${which} answers in full`), list);
    details.addEventListener("toggle", () => {
      if (list.childElementCount) return;
      for (const [, completion, reward, count] of rollout[ANSWERS]) {
        list.append(make("li", "", foreign("pre", "", completion || "(nothing)"), make("span", "earned",
          `${count > 1 ? `${count} times · ` : ""}${reward === null ? "a vote only, no reward" : `reward ${reward.toFixed(2)}`}`)));
      }
    });
    body.append(details);
    const article = make("article", `card run${run}`);
    if (rollout[IMAGE] !== null) {
      const image = make("img");
      image.alt = `Image ${rollout[NAME]}`;
      image.decoding = "async";
      image.addEventListener("load", () => { if (image.naturalWidth <= 160) image.classList.add("small"); });
      image.src = `data:image/webp;base64,${data.images[rollout[IMAGE]]}`;
      article.append(make("div", "picture", image));
    }
    article.append(body);
    return article;
  };

  const draw = () => {
    const most = Math.max(...found.map((list) => list.length));
    const pages = Math.max(1, Math.ceil(most / PAGE));
    page = Math.min(page, pages - 1);
    const cards = document.createDocumentFragment();
    for (let i = page * PAGE; i < Math.min(most, (page + 1) * PAGE); i++) {
      found.forEach((list, run) => cards.append(i < list.length ? card(list[i], run) : make("article", "card empty")));
    }
    byId("cards").replaceChildren(cards);
    const counts = found.map((list, run) =>
      `${list.length.toLocaleString("en")} of ${data.runs[run].rollouts.length.toLocaleString("en")}${found.length > 1 ? ` of run ${"AB"[run]}` : ""}`);
    byId("status").textContent = most
      ? `${counts.join(", ")} rollouts match.`
      : `No rollout matches.${byId("pictured").checked ? " Those without a picture are left out." : ""}`;
    byId("page").textContent = `page ${page + 1} of ${pages}`;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page === pages - 1;
    byId("pager").hidden = pages === 1;
  };
  const turn = (by) => {
    page += by;
    draw();
    byId("gallery").scrollIntoView();
    byId("gallery").focus({ preventScroll: true });
  };

  const kinds = new Map();
  for (const run of data.runs) for (const [kind, count] of run.kinds) kinds.set(kind, (kinds.get(kind) || 0) + count);
  for (const [kind, count] of [...kinds].sort((a, b) => b[1] - a[1])) {
    const option = make("option", "", `${kind} (${count.toLocaleString("en")})`);
    option.value = kind;
    byId("kind").append(option);
  }
  byId("pictured").disabled = !anyPicture;
  byId("filters").addEventListener("input", filter);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () => setTimeout(() => { setDefaults(); filter(); }));
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  setDefaults();
  filter();
})();
