// The review queue in the browser. Everything from a row is set as text, never as markup; nothing leaves the page.
const KEYS = { a: "accept", r: "reject", e: "edit", n: "next", j: "next", k: "back", p: "back" };
const LABELS = { accept: "Accept", reject: "Reject", edit: "Edit", back: "Back", next: "Next" };
const PAST = { accept: "accepted", reject: "rejected", edit: "edited" };
const STYLE = `
.slm { --ink: var(--jp-ui-font-color1, #222); --dim: var(--jp-ui-font-color2, #666); --line: var(--jp-border-color2, #ccc);
  max-width: 820px; padding: 16px 20px; border: 1px solid var(--line); border-radius: 10px; color: var(--ink);
  background: var(--jp-layout-color1, #fff); font: 15px/1.55 var(--jp-ui-font-family, system-ui, sans-serif); outline: none; }
.slm:focus-within { border-color: #3b7dd8; box-shadow: 0 0 0 2px #3b7dd855; }
.slm .bar { display: flex; gap: 14px; align-items: center; flex-wrap: wrap; }
.slm .bar > :last-child { margin-left: auto; }
.slm .dim { color: var(--dim); font-size: 13px; }
.slm progress { width: 140px; accent-color: #3b7dd8; }
.slm input, .slm textarea { font: inherit; color: inherit; background: var(--jp-layout-color0, #fff); padding: 5px 8px;
  border: 1px solid var(--line); border-radius: 6px; box-sizing: border-box; }
.slm .why { display: inline-block; margin: 12px 8px 0 0; padding: 2px 10px; border-radius: 12px; background: #f5a62333; font-size: 13px; }
.slm .turn { margin: 12px 0; padding: 10px 14px; border-radius: 10px; white-space: pre-wrap; overflow-wrap: anywhere; }
.slm .role { display: block; color: var(--dim); font-size: 12px; }
.slm .system { padding: 4px 14px; color: var(--dim); font-size: 13px; border-left: 3px solid var(--line); border-radius: 0; }
.slm .user { margin-right: 60px; background: #3b7dd81f; }
.slm .assistant { margin-left: 60px; background: #2e9e5b1f; }
.slm .json { font: 14px/1.5 var(--jp-code-font-family, monospace); }
.slm textarea { width: 100%; min-height: 190px; }
.slm button { font: inherit; color: inherit; padding: 7px 16px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--jp-layout-color2, #f2f2f2); cursor: pointer; }
.slm button:hover { border-color: #3b7dd8; }
.slm .accept { background: #2e9e5b40; } .slm .reject { background: #d9483b33; }
.slm kbd { margin-left: 8px; padding: 0 6px; border: 1px solid var(--line); border-radius: 4px; font-size: 12px; color: var(--dim); }
.slm .error { color: #c0392b; font-weight: 600; }
.slm .hint { visibility: visible; } .slm:focus-within .hint { visibility: hidden; }`;

const el = (tag, cls, text, ...inside) => {
  const node = document.createElement(tag);
  node.className = cls;
  if (text) node.textContent = text;
  node.append(...inside);
  return node;
};

const turn = (role, ...inside) => el("div", `turn ${role}`, "", el("span", "role", role), ...inside);

function render({ model, el: root }) {
  const box = el("div", "slm"), body = el("div", "");
  const name = el("input", "reviewer"), note = el("input", "note");
  name.placeholder = "your name";
  note.placeholder = "why (optional)";
  box.tabIndex = 0;
  box.dataset.lmSuppressShortcuts = "true"; // else JupyterLab takes `a` for "insert a cell above"
  let editing = null; // the text area while an answer is edited
  const card = () => model.get("card");

  function send(word, answer) {
    model.send({ do: word, id: card().id, reviewer: name.value, reason: note.value, answer });
  }
  function act(word) {
    if (!card().id) return;
    if (word === "edit" && !editing) return draw(card().answer);
    if (word === "edit") return send("edit", editing.value);
    editing = null;
    send(word);
  }
  function button(word, key, label) {
    const node = el("button", word, label || LABELS[word], el("kbd", "", key));
    node.onclick = () => act(word);
    return node;
  }
  function draw(text = null) {
    const c = card();
    const seen = c.id ? `${c.at + 1} of ${c.total}` : "";
    const bar = el("progress", "");
    bar.max = c.total || 1;
    bar.value = c.done;
    const head = el("div", "bar", "", el("b", "", seen), bar, el("span", "dim", `${c.done} decided, ${c.total - c.done} left`), name);
    body.replaceChildren(head);
    if (!c.id) return body.append(el("p", "", "Nothing waits for a person."));
    for (const why of c.why) body.append(el("span", "why", why));
    body.append(el("div", "dim", c.facts + (c.decided ? ` · ${PAST[c.decided]}` : "")));
    for (const t of c.turns) {
      const said = el("span", "", t.content);
      said.dir = "auto";
      body.append(turn(t.role, said));
    }
    editing = text === null ? null : el("textarea", "json");
    if (editing) editing.value = text;
    body.append(turn("assistant", editing || el("span", "json", c.answer)));
    const all = c.done === c.total ? "All rows are decided; run 04 again to apply them." : "";
    body.append(el("p", c.error ? "error" : "dim", c.error || all));
    const keys = editing
      ? [button("edit", "Ctrl+Enter", "Save"), button("cancel", "Esc", "Cancel")]
      : ["accept", "reject", "edit", "back", "next"].map((word) => button(word, { back: "k" }[word] || word[0]));
    if (editing) keys[1].onclick = () => (draw(), box.focus());
    body.append(el("div", "bar", "", ...keys, note), el("div", "dim hint", "Click the card, then use the keys."));
    (editing || (document.activeElement === document.body ? box : { focus() {} })).focus();
  }

  box.addEventListener("keydown", (event) => {
    event.stopPropagation();
    const typing = ["INPUT", "TEXTAREA"].includes(event.target.tagName);
    if (event.key === "Escape") return draw(), box.focus();
    if (event.key === "Enter" && event.target.tagName === "INPUT") return box.focus();
    if (editing && event.key === "Enter" && (event.ctrlKey || event.metaKey)) return event.preventDefault(), act("edit");
    if (typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
    event.preventDefault();
    act(KEYS[event.key]);
  });
  model.on("change:card", () => {
    const failed = card().error && editing;
    if (!card().error) note.value = "";
    draw(failed ? editing.value : null);
    if (!failed) card().error ? name.focus() : box.focus();
  });
  box.append(el("style", "", STYLE), body);
  root.append(box);
  draw();
}

export default { render };
