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
  function all(isDark, width) { boxes.forEach(function (box) { draw(box, isDark, width); }); }
  var next = 0;
  (function one() {  // a chart at a time, so that the page can be read meanwhile
    if (next < boxes.length) { draw(boxes[next], dark.matches); next += 1; setTimeout(one, 0); }
  })();
  var views = JSON.parse(document.getElementById('views').textContent);
  var pointed = document.getElementById('pointed');
  function point(event) {  // the lines of the token under the mouse or the finger
    var token = event.target.closest('.colored-tokens > span');
    pointed.hidden = !token;
    if (!token) { return; }
    var box = token.closest('.view');
    var place = Array.prototype.indexOf.call(token.parentNode.children, token);
    pointed.replaceChildren();
    views[Number(box.id.slice(5))].pointed[place].forEach(function (line, at) {
      var part = pointed.appendChild(document.createElement(at ? 'div' : 'b'));
      part.textContent = line;
    });
    var at = token.getBoundingClientRect(), own = pointed.getBoundingClientRect();
    var below = at.bottom + 6 + own.height < window.innerHeight;
    pointed.style.left = Math.max(4, Math.min(at.left, document.documentElement.clientWidth - own.width - 4)) + 'px';
    pointed.style.top = (below ? at.bottom + 6 : Math.max(4, at.top - own.height - 6)) + 'px';
  }
  views.forEach(function (view, place) {
    var box = document.getElementById('view-' + place);
    CircuitsVis.render(box.id, CircuitsVis[view.component], view.properties);
    if (view.pointed.length) { box.addEventListener('mouseover', point); box.addEventListener('click', point); }
    box.addEventListener('mouseleave', function () { pointed.hidden = true; });
  });
  window.addEventListener('scroll', function () { pointed.hidden = true; }, {passive: true});
  dark.addEventListener('change', function () { all(dark.matches); });
  window.addEventListener('beforeprint', function () { all(false, 660); });
  window.addEventListener('afterprint', function () { all(dark.matches); });
})();
