"""How the page looks and moves: system fonts, a grid that becomes a column on a phone, keys for the votes."""

from __future__ import annotations

# Gradio 6.31 bundles web fonts of which some weights lack most letters, and none has Chinese: use the reader's own.
FONTS = (
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans CJK SC",
    "WenQuanYi Micro Hei",
    "sans-serif",
)
MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container { width: 100% !important; max-width: 1680px !important; margin: 0 auto !important; }
.gradio-container > .main { width: 100% !important; max-width: none !important; padding: 10px 16px 4px !important; }
.gradio-container .column { gap: 10px; }
#head p { margin: 0; color: var(--body-text-color); opacity: .8; font-size: .92rem; }
#panes { gap: 12px; }
.pane { min-width: 0 !important; height: max(240px, calc(100dvh - 326px)) !important; }
.pane .top-panel, .pane .message-buttons-right { display: none !important; }
.pane .message-row { margin-block: 6px !important; }
.pane .message-wrap { padding-top: 14px; }
#status { min-height: 46px; }
#status, #status > *, #status .prose { padding: 0 !important; }
#status p { margin: 0; font-size: .92rem; line-height: 1.5; }
#status .saved { font-weight: 600; }
#status .refused { color: #b91c1c; }
.dark #status .refused { color: #fca5a5; }
#status .facts { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 12px;
  font-variant-numeric: tabular-nums; }
#status .facts p { font-size: .85rem; overflow-wrap: anywhere; }
#votes { display: grid !important; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 8px; }
#votes button { min-height: 44px; min-width: 0; white-space: nowrap; }
#asking { align-items: stretch; gap: 8px; }
#asking button { min-width: 104px; max-width: 140px; padding-inline: 6px; font-size: .95rem; }
#sampling .form { border: 0; }
footer { opacity: .8; margin: 4px 0 !important; }
@media (hover: hover) and (pointer: fine) and (min-width: 641px) {
  #votes button::after { content: attr(data-key); margin-left: .6em; padding: 0 .45em; border: 1px solid currentColor;
    border-radius: 4px; font-size: .75em; opacity: .6; }
}
@media (max-width: 640px) {
  .gradio-container > .main { padding: 8px !important; }
  #panes { flex-direction: column; }
  .pane { width: 100% !important; height: 32dvh !important; min-height: 190px !important; }
  #status .facts { grid-auto-flow: row; gap: 2px; }
  #votes { grid-template-columns: 1fr 1fr; }
  #asking { flex-wrap: wrap; }
  #asking > :first-child { flex: 1 1 100% !important; }
  #asking button { flex: 1 1 40% !important; max-width: none; min-height: 44px; }
}
"""

# Digits vote and Escape stops, but a digit typed into a field is only a digit. Of impatient clicks the first counts:
# sent all at once, they could arrive in any order.
JS = """() => {
  const buttons = () => Array.from(document.querySelectorAll('#votes button'));
  const number = () => buttons().forEach((button, index) => button.setAttribute('data-key', index + 1));
  number();
  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (event.key === 'Escape') { document.getElementById('stop')?.click(); return; }
    const target = event.target;
    if (target && (target.isContentEditable || ['INPUT', 'TEXTAREA', 'SELECT'].includes(target.tagName))) return;
    const button = buttons()[Number(event.key) - 1];
    if (button && !button.disabled) button.click();
  });
  let voted = -Infinity;
  document.addEventListener('click', (event) => {
    if (!event.target.closest?.('#votes button')) return;
    if (event.timeStamp - voted < 1000) { event.stopImmediatePropagation(); event.preventDefault(); return; }
    voted = event.timeStamp;
  }, true);
}"""

# An answer is markdown from a model: without this, an image in it makes the reader's browser call any address it names.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "frame-ancestors 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)
