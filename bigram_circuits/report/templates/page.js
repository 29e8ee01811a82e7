(function () {
  var figures = JSON.parse(document.getElementById('figures').textContent);
  var boxes = Array.prototype.slice.call(document.querySelectorAll('.chart'));
  var dark = window.matchMedia('(prefers-color-scheme: dark)');
  function themed(figure, colours) {
    return JSON.parse(JSON.stringify(figure), function (key, value) {
      return typeof value === 'string' && Object.hasOwn(colours, value) ? colours[value] : value;
    });
  }
  function draw(box, isDark, width) {
    var colours = isDark ? {'#7A7A7A': '#e6e8eb', '#808080': '#9aa3ad', '#0072B2': '#3d9fdc', '#D55E00': '#f07f2e'}
                         : {'#7A7A7A': '#222222', '#808080': '#5f6670'};
    var figure = themed(figures[Number(box.dataset.figure)], colours);
    if (width) { figure.layout.width = width; }
    Plotly.react(box, figure.data, figure.layout, {displayModeBar: false, responsive: true, displaylogo: false});
  }
  var shown = [];  // the charts that were drawn
  function all(isDark, width) { shown.forEach(function (box) { draw(box, isDark, width); }); }
  function isOpen(box) { return !box.closest('details:not([open])'); }
  function drawOpen() {  // what is in open sections, a chart at a time, so that the page can be read meanwhile
    var box = boxes.find(function (one) { return !shown.includes(one) && isOpen(one); });
    if (box) { shown.push(box); draw(box, dark.matches); setTimeout(drawOpen, 0); return; }
    drawViews();
  }
  function drawViews() {
    document.querySelectorAll('.view:not([data-drawn])').forEach(function (one) {
      if (isOpen(one)) { one.dataset.drawn = 'yes'; view(one); }
    });
  }
  var views = JSON.parse(document.getElementById('views').textContent);
  var pointed = document.getElementById('pointed');
  function point(event) {  // the lines of the token under the mouse or the finger
    var token = event.target.closest('.colored-tokens > span');
    pointed.hidden = !token;
    if (!token) { return; }
    var place = Array.prototype.indexOf.call(token.parentNode.children, token);
    tell(token, views[Number(token.closest('.view').id.slice(5))].pointed[place]);
  }
  function tell(element, lines) {  // show lines beside an element, the first of several as their heading
    pointed.hidden = false;
    pointed.replaceChildren();
    lines.forEach(function (line, at) {
      pointed.appendChild(document.createElement(at || lines.length < 2 ? 'div' : 'b')).textContent = line;
    });
    var at = element.getBoundingClientRect(), own = pointed.getBoundingClientRect();
    var below = at.bottom + 6 + own.height < window.innerHeight;
    pointed.style.left = Math.max(4, Math.min(at.left, document.documentElement.clientWidth - own.width - 4)) + 'px';
    pointed.style.top = (below ? at.bottom + 6 : Math.max(4, at.top - own.height - 6)) + 'px';
  }
  function view(box) {
    var one = views[Number(box.id.slice(5))];
    CircuitsVis.render(box.id, CircuitsVis[one.component], one.properties);
    if (one.pointed.length) { box.addEventListener('mouseover', point); box.addEventListener('click', point); }
    box.addEventListener('mouseleave', hide);
  }
  function hide() { pointed.hidden = true; }
  function explain(event) {  // what a number means, on touch and by keyboard; a mouse shows the title
    var name = event.target.closest('abbr[title]');
    if (name) { tell(name, [name.title]); } else if (event.type === 'focusin') { hide(); }
  }
  document.addEventListener('focusin', explain);
  document.addEventListener('focusout', hide);
  document.addEventListener('keydown', function (event) { if (event.key === 'Escape') { hide(); } });
  window.addEventListener('scroll', hide, {passive: true});
  document.addEventListener('toggle', function (event) { if (event.target.open) { drawOpen(); } }, true);
  function reveal() {  // the section that the address names, and what it is in
    var at = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (var part = at && at.closest('details:not([open])'); part; part = part.parentNode.closest('details:not([open])')) {
      part.open = true;
      at.scrollIntoView();
    }
  }
  window.addEventListener('hashchange', reveal);
  reveal();
  drawOpen();
  dark.addEventListener('change', function () { all(dark.matches); });
  var closed = [];
  window.addEventListener('beforeprint', function () {
    closed = Array.prototype.slice.call(document.querySelectorAll('.part:not([open])'));
    closed.forEach(function (part) { part.open = true; });
    shown = boxes.slice();
    all(false, 660);
    drawViews();
  });
  window.addEventListener('afterprint', function () {
    closed.forEach(function (part) { part.open = false; });
    all(dark.matches);
  });
})();
