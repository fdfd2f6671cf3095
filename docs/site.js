// Elements that the theme adds by script get what screen readers and keyboards need: the group of a
// code block's buttons is no landmark of its own, and a block that scrolls can be reached by Tab.
function describe() {
  for (const group of document.querySelectorAll(".md-code__nav:not([role])")) {
    group.setAttribute("role", "none");
  }
  for (const block of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code")) {
    if (block.scrollWidth > block.clientWidth) block.tabIndex = 0;
    else block.removeAttribute("tabindex");
  }
}
new MutationObserver(describe).observe(document.body, { childList: true, subtree: true });
addEventListener("resize", describe);
describe();
