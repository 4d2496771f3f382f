() => {
  const typing = (node) => node && (node.isContentEditable || ['TEXTAREA', 'SELECT'].includes(node.tagName)
    || (node.tagName === 'INPUT' && !['checkbox', 'radio', 'range', 'button'].includes(node.type)));
  const seen = (node) => node && node.offsetParent !== null;
  const press = (selector) => [...document.querySelectorAll(selector)].find((node) => seen(node) && !node.disabled)?.click();
  const votes = () => [...document.querySelectorAll('.votes button')].filter(seen);

  // The voter is a random word stored by this browser, or the one in the address (?voter=...); never a name.
  const voter = () => {
    const asked = new URLSearchParams(location.search).get('voter');
    if (asked && /^[\w-]{1,32}$/.test(asked)) return asked;
    let kept = localStorage.getItem('align-voter');
    if (!kept) {
      kept = 'v' + [...crypto.getRandomValues(new Uint8Array(5))].map((n) => n.toString(16).padStart(2, '0')).join('');
      localStorage.setItem('align-voter', kept);
    }
    return kept;
  };
  window.alignClient = () => `${document.documentElement.lang || navigator.language}|${voter()}`;

  // Labels for screen readers that gradio leaves out, and the digits on the vote buttons.
  const name = () => {
    document.querySelectorAll('.votes').forEach((row) =>
      row.querySelectorAll('button').forEach((button, index) => {
        button.setAttribute('data-key', index + 1);
        button.setAttribute('aria-keyshortcuts', index + 1);
      }));
    const answer = document.documentElement.lang.startsWith('zh') ? '回答' : 'Answer';
    document.querySelectorAll('.pane').forEach((pane) => {
      const label = `${answer} ${pane.querySelector('[data-testid="block-label"]')?.innerText.trim()}`;
      const log = pane.querySelector('[role="log"]');
      if (log && log.getAttribute('aria-label') !== label) log.setAttribute('aria-label', label);
      const button = pane.closest('.column').querySelector('.expand');
      button?.setAttribute('aria-label', `${button.innerText}: ${label}`);
      button?.setAttribute('aria-pressed', pane.closest('.column').classList.contains('alone'));
    });
    document.querySelectorAll('.status').forEach((line) => line.setAttribute('aria-live', 'polite'));
  };
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  name();

  // Expand one pane or show all again; only the layout changes.
  const expand = (column) => {
    const alone = column && !column.classList.contains('alone');
    document.querySelectorAll('.panes > .column.alone').forEach((other) => other.classList.remove('alone'));
    if (alone) column.classList.add('alone');
    name();
  };
  const expandNext = () => {
    const columns = [...([...document.querySelectorAll('.panes')].find(seen)?.querySelectorAll(':scope > .column') || [])];
    expand(columns[columns.findIndex((column) => column.classList.contains('alone')) + 1]);
  };

  const help = () => {
    let dialog = document.querySelector('dialog.help');
    if (!dialog) {
      dialog = document.body.appendChild(document.createElement('dialog'));
      dialog.className = 'help';
      dialog.addEventListener('click', (event) => { if (event.target === dialog) dialog.close(); });
    }
    if (dialog.open) return dialog.close();
    const done = document.createElement('button');
    done.textContent = 'OK';
    done.addEventListener('click', () => dialog.close());
    const help = document.querySelector('#help .md');
    dialog.setAttribute('aria-label', help.querySelector('h3').textContent);
    dialog.replaceChildren(...[...help.children].map((node) => node.cloneNode(true)), done);
    dialog.showModal();
  };

  document.addEventListener('keydown', (event) => {
    if (event.key === 'Enter') voted = -Infinity;
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
      if (!seen(document.getElementById('ask'))) return;
      event.preventDefault();
      event.stopImmediatePropagation();
      // Gradio receives typed text with a delay; an immediate click would send the text without its last letters.
      setTimeout(() => press('#ask'), 50);
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (document.querySelector('dialog.help')?.open) return;
    if (event.key === 'Escape') { hide(); press('#stop'); return; }
    if (typing(event.target)) return;
    if (event.key === '?') { event.preventDefault(); help(); return; }
    const key = event.key.toLowerCase();
    if (key === 'n') press('.next');
    else if (key === 't') press('.shift-button');
    else if (key === 'd') press('.difference-button');
    else if (key === 'f') expandNext();
    else if (event.key >= '1' && event.key <= '9') {
      const button = votes()[Number(event.key) - 1];
      if (button && !button.disabled) button.click();
    }
  }, true);

  // Of repeated clicks only the first counts: sent together, they could arrive in any order. Clicks after
  // another button, or after a question, are about other answers.
  let voted = -Infinity;
  document.addEventListener('click', (event) => {
    if (event.target.closest?.('#help-button')) { help(); return; }
    if (event.target.closest?.('.expand')) { expand(event.target.closest('.column')); return; }
    if (!event.target.closest?.('.votes button')) {
      if (event.target.closest?.('button')) voted = -Infinity;
      return;
    }
    if (event.timeStamp - voted < 1000) { event.stopImmediatePropagation(); event.preventDefault(); return; }
    voted = event.timeStamp;
  }, true);

  // Answers contain a mark (`battle_view.MARK`) behind what must not become a tag, an image or a diagram. It must not
  // be copied or disturb a search, so it is removed as soon as the text is rendered.
  const MARK = /\u2060/g;
  const unmark = (root) => {
    const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    do {
      const text = texts.currentNode;
      if (text.nodeType === Node.TEXT_NODE && text.data.includes('\u2060')) text.data = text.data.replace(MARK, '');
    } while (texts.nextNode());
  };
  new MutationObserver((changes) => changes.forEach((change) => {
    if (change.target.closest('.pane')) change.addedNodes.forEach(unmark);
  })).observe(document.body, { childList: true, subtree: true });
  const clipboard = navigator.clipboard, write = clipboard?.writeText;
  if (write) clipboard.writeText = (text) => write.call(clipboard, text.replace(MARK, ''));

  // A link in an answer opens in a new tab, and only to the web.
  document.addEventListener('click', (event) => {
    const link = event.target.closest?.('.pane [role="log"] a');
    if (!link) return;
    if (!/^https?:$/.test(link.protocol)) { event.preventDefault(); return; }
    link.target = '_blank';
    link.rel = 'noopener noreferrer';
  }, true);

  // The token shift: one tooltip for all tokens, its content set as text, never as markup.
  const tip = document.body.appendChild(document.createElement('div'));
  tip.id = 'tip';
  tip.hidden = true;
  tip.setAttribute('role', 'tooltip');
  const hide = () => { tip.hidden = true; };
  const part = (kind, text) => {
    const node = document.createElement('div');
    node.className = kind;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const visible = (text) => text.replace(/\n/g, '↵').replace(/\t/g, '⇥').replace(/ /g, '·') || '∅';
  const percent = (logprob) => {
    const share = 100 * Math.exp(logprob);
    return share >= 0.1 ? share.toFixed(1) + ' %' : '< 0.1 %';
  };
  const side = (title, logprob, others) => {
    const box = part('');
    const head = part('other');
    head.append(Object.assign(document.createElement('span'), { className: 'side', textContent: title }),
      Object.assign(document.createElement('span'), { textContent: percent(logprob) }));
    box.append(head);
    for (const [text, value] of others) {
      const row = part('other');
      row.append(Object.assign(document.createElement('span'), { textContent: visible(text) }),
        Object.assign(document.createElement('span'), { textContent: percent(value) }));
      box.append(row);
    }
    return box;
  };
  const show = (token) => {
    const logprobs = JSON.parse(token.dataset.logprobs);
    const names = token.closest('.tokens').dataset;
    const sides = part('sides');
    sides.append(side(names.model, logprobs.p, logprobs.top), side(names.base, logprobs.b, logprobs.base));
    const shift = logprobs.p - logprobs.b;
    tip.replaceChildren(part('token', `${visible(token.textContent)}   ${shift >= 0 ? '+' : '−'}${Math.abs(shift).toFixed(2)} nat`), sides);
    tip.hidden = false;
    const at = token.getClientRects()[0], box = tip.getBoundingClientRect();
    tip.style.left = Math.max(8, Math.min(at.left, innerWidth - box.width - 8)) + 'px';
    tip.style.top = (at.bottom + box.height + 12 > innerHeight ? Math.max(8, at.top - box.height - 6) : at.bottom + 6) + 'px';
    token.setAttribute('aria-describedby', 'tip');
  };
  const token = (event) => event.target.closest?.('.tok[data-logprobs]');
  document.addEventListener('mouseover', (event) => { const at = token(event); if (at) show(at); else hide(); });
  document.addEventListener('focusin', (event) => { const at = token(event); if (at) show(at); else hide(); });
  document.addEventListener('scroll', hide, true);
  // One tab stop for a whole answer; the arrow keys move within it.
  document.addEventListener('keydown', (event) => {
    const at = token(event);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    if (!at || !step) return;
    event.preventDefault();
    const all = [...at.closest('.tokens').querySelectorAll('.tok')];
    const next = all[Math.max(0, Math.min(all.length - 1, all.indexOf(at) + step))];
    at.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    next.scrollIntoView({ block: 'nearest' });
    show(next);
  });
}
