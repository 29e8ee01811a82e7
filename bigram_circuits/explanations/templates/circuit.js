(function () {
  'use strict';
  const FIRST = 16, NEIGHBOURS = 3, MATCHES = 8, LISTED = 6;  // nodes shown at first, added by expanding, by a search; rows
  const KIND = 0, LABEL = 1, LAYER = 2, POSITION = 3, DIRECT = 4, FLOW = 5, UNSEEN = 6, ACTIVATION = 7;  // of a node
  const FROM = 0, TO = 1, STRENGTH = 2;  // of an edge
  const KINDS = {
    token: 'the embedding of a token', position: 'the embedding of a position', neuron: 'an MLP neuron',
    head: 'an attention head', attn: 'a whole attention layer', mlp: 'a whole MLP',
    bias: 'biases, the same for every prompt', replaced: 'what stands for the nodes that the circuit drops',
    answer: 'what is explained'
  };
  const SOURCES = ['token', 'position', 'bias', 'replaced'];
  const RANK = {token: 0, position: 1, bias: 2, replaced: 3, head: 0, attn: 0, mlp: 1, neuron: 1, answer: 0};
  const SVG = 'http://www.w3.org/2000/svg';
  const LOW = 28, HIGH = 42, LANE = 8, LANES = 12;  // pixels: of nodes with one line and with two, of the room of an edge
  const TOP = 24, WIDEST = 12, TALL = 500;  // pixels: of headings, of edges, of a picture that is not crowded

  document.querySelectorAll('.circuit').forEach(start);

  function make(parent, tag, name, text) {
    const one = parent.appendChild(document.createElement(tag));
    if (name) { one.className = name; }
    if (text !== undefined) { one.textContent = text; }
    return one;
  }
  function quoted(token) {  // as Python does it
    const mark = token.includes("'") && !token.includes('"') ? '"' : "'";
    return mark + token.replaceAll('\\', '\\\\').replaceAll(mark, '\\' + mark) + mark;
  }
  function number(value, signed) {
    if (value === null || value === undefined) { return 'undefined'; }
    const size = Math.abs(value);
    const text = size && size < 0.005 ? size.toExponential(1) : size.toFixed(size < 10 ? 2 : 1);
    return (value < 0 ? '\u2212' : signed ? '+' : '') + text;
  }
  function brief(value) {  // where there is little room
    const size = Math.abs(value), text = size < 0.995 ? size.toFixed(2) : size.toFixed(size < 99.5 ? 1 : 0);
    return (value < 0 ? '\u2212' : '+') + text;
  }
  function percent(share) {
    return share === null ? 'undefined' : (100 * share).toFixed(share >= 0.1 || !share ? 0 : 1) + '%';
  }
  function strength(one) { return Math.abs(one || 0); }

  function start(root) {
    const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
    const find = (name) => root.querySelector(name);
    const board = find('.board'), stage = find('.stage'), panel = find('.panel'), slider = find('input[type=range]');
    const search = find('.find'), chips = find('.chips'), output = find('output');
    const lines = stage.appendChild(document.createElementNS(SVG, 'svg'));
    lines.setAttribute('aria-hidden', 'true');
    let graph, order, into, outOf, end, most;  // of the graph that is shown
    let extra, hidden, matching, pinned, aimed, buttons;  // what a reader did with it

    // --- which graph, which of its nodes ---

    function choose(place) {
      graph = data.graphs[place];
      end = graph.nodes.findIndex((node) => node[KIND] === 'answer');
      order = graph.nodes.map((_, at) => at).filter((at) => at !== end);
      const asked = (at) => graph.nodes[at][KIND] === 'token' && graph.nodes[at][POSITION] === graph.position;
      order.sort((a, b) => asked(b) - asked(a) || strength(graph.nodes[b][FLOW]) - strength(graph.nodes[a][FLOW]));
      into = graph.nodes.map(() => []);
      outOf = graph.nodes.map(() => []);
      graph.edges.forEach((edge) => { into[edge[TO]].push(edge); outOf[edge[FROM]].push(edge); });
      [...into, ...outOf].forEach((edges) => edges.sort((a, b) => strength(b[STRENGTH]) - strength(a[STRENGTH])));
      most = {
        edge: Math.max(1e-12, ...graph.edges.map((edge) => strength(edge[STRENGTH]))),
        node: Math.max(1e-12, ...order.map((at) => strength(graph.nodes[at][FLOW])))
      };
      slider.max = order.length;
      if (chips) {
        chips.childNodes.forEach((chip) => chip.setAttribute('aria-pressed', String(+chip.dataset.graph === place)));
      }
      reset();
    }
    function reset() {
      extra = new Set();
      hidden = new Set();
      matching = new Set();
      pinned = aimed = null;
      slider.value = Math.min(FIRST, order.length);
      if (!chips) { search.value = ''; }
      draw();
      overview();
    }
    function shownNodes() {
      const shown = new Set(order.slice(0, +slider.value));
      extra.forEach((at) => shown.add(at));
      hidden.forEach((at) => shown.delete(at));
      if (end >= 0) { shown.add(end); }
      return shown;
    }
    function covered(shown) {  // what the paths among these nodes add up to: in a linear model, shares multiply
      const share = graph.nodes.map(() => 0);
      const forwards = [...shown].sort((a, b) => column(a) - column(b) || rank(a) - rank(b));
      forwards.forEach((at) => {
        const node = graph.nodes[at];
        const source = SOURCES.includes(node[KIND]);
        const sum = into[at].reduce((all, edge) => all + (shown.has(edge[FROM]) ? edge[STRENGTH] * share[edge[FROM]] : 0), 0);
        share[at] = source ? 1 : at === end ? sum : node[FLOW] ? sum / node[FLOW] : 0;
      });
      return end >= 0 ? share[end] : 0;
    }

    // --- the picture ---

    function column(at) {
      const node = graph.nodes[at];
      return at === end ? Infinity : SOURCES.includes(node[KIND]) ? -1 : node[LAYER];
    }
    function height(at) { return caption(at) ? HIGH : LOW; }
    function middle(spot) { return spot.y + spot.height / 2; }
    function label(at) { return data.labels[graph.nodes[at][LABEL]]; }
    function name(at) {  // where a label alone may be that of several nodes
      const position = graph.nodes[at][POSITION];
      return label(at) + (position === null || graph.prompt.length < 2 ? '' : ' @' + position);
    }

    function layout(shown) {  // the place of every node, of every column and of every band of a position
      const columns = [...new Set([...shown].map(column))].sort((a, b) => a - b);
      const positions = [...new Set([...shown].filter((at) => at !== end).map((at) => graph.nodes[at][POSITION]))];
      const banded = positions.filter((one) => one !== null).length > 1;
      const rows = banded ? bands(positions) : [undefined];
      const room = board.clientWidth - 24, spaces = Math.max(1, columns.length - 1);
      const width = Math.max(116, Math.min(136, (room - 48 * spaces) / columns.length));
      const pitch = width + Math.max(44, Math.min(150, (room - columns.length * width) / spaces));
      const cells = new Map(), place = new Map(), tops = [];
      const rowOf = (at) => !banded ? undefined : at === end ? graph.position : graph.nodes[at][POSITION];
      const add = (item, columnPlace, row) => {
        const key = columnPlace + ' ' + row;
        cells.set(key, [...(cells.get(key) || []), item]);
      };
      shown.forEach((at) => add(at, columns.indexOf(column(at)), rowOf(at)));
      const routes = lanes(shown, columns);
      routes.forEach((route, edge) => route.forEach((lane) => add(lane, lane.column, rowOf(edge[FROM]))));
      const full = (cell) => cell.reduce((sum, item) => sum + heightOf(item), 0);
      const gap = banded ? 8 : Math.max(8, Math.min(28, ...[...cells.values()].map((cell) => (TALL - full(cell)) / cell.length)));
      const extent = (cell) => full(cell) + gap * (cell.length - 1);
      const tall = rows.map((row) => Math.max(LOW, ...columns.map((_, at) => extent(cells.get(at + ' ' + row) || []))));
      tall.reduce((top, height, at) => { tops[at] = top; return top + height + (banded ? 14 : 0); }, TOP + 6);
      const each = (order) => columns.forEach((_, columnPlace) => rows.forEach((row, rowPlace) => {
        const key = columnPlace + ' ' + row;
        if (!cells.has(key)) { return; }
        const cell = order(cells.get(key));
        cells.set(key, cell);
        let y = tops[rowPlace] + (tall[rowPlace] - extent(cell)) / 2;
        cell.forEach((item) => {
          place.set(item, {x: columnPlace * pitch, y: y, width: width, height: heightOf(item)});
          y += heightOf(item) + gap;
        });
      }));
      each((cell) => ordered(cell, () => 0));
      for (let sweep = 0; sweep < 8; sweep += 1) {  // towards the mean height of what they are joined to: fewer crossings
        each((cell) => ordered(cell, (item) => pull(item, place)));
      }
      const last = rows.length - 1;
      return {place, routes, columns, pitch, width, banded, rows, tall, tops,
              across: (columns.length - 1) * pitch + width, down: tops[last] + tall[last]};
    }
    function lanes(shown, columns) {  // room in the columns that strong edges cross, so that no node hides them
      const crossing = graph.edges.filter((edge) => shown.has(edge[FROM]) && shown.has(edge[TO]) &&
        columns.indexOf(column(edge[TO])) - columns.indexOf(column(edge[FROM])) > 1 && strength(edge[STRENGTH]) > most.edge / 8);
      crossing.sort((a, b) => strength(b[STRENGTH]) - strength(a[STRENGTH]));
      return new Map(crossing.slice(0, LANES).map((edge) => {
        const route = [], to = columns.indexOf(column(edge[TO]));
        for (let at = columns.indexOf(column(edge[FROM])) + 1; at < to; at += 1) { route.push({column: at}); }
        route.forEach((lane, at) => {
          lane.joins = [at ? route[at - 1] : edge[FROM], at < route.length - 1 ? route[at + 1] : edge[TO]];
        });
        return [edge, route];
      }));
    }
    function heightOf(item) { return item.joins ? LANE : height(item); }
    function bands(positions) {  // rows of the picture, in the order of the prompt; all of a short prompt
      const all = graph.prompt.length <= 16 ? graph.prompt.map((_, at) => at) : positions.filter((one) => one !== null);
      const found = [...new Set([...all, graph.position])].sort((a, b) => a - b);
      return positions.includes(null) ? [...found, null] : found;
    }
    function ordered(cell, wanted) {  // a cell from top to bottom: heads, then the rest, and lanes where they are wanted
      const heights = new Map(cell.map((item) => [item, wanted(item)]));
      const found = cell.filter((item) => !item.joins).sort((a, b) => rank(a) - rank(b) ||
        heights.get(a) - heights.get(b) || strength(graph.nodes[b][FLOW]) - strength(graph.nodes[a][FLOW]) || a - b);
      cell.filter((item) => item.joins).sort((a, b) => heights.get(a) - heights.get(b)).forEach((lane) => {
        found.splice(found.filter((item) => heights.get(item) <= heights.get(lane)).length, 0, lane);
      });
      return found;
    }
    function rank(at) { return RANK[graph.nodes[at][KIND]]; }
    function pull(item, place) {  // the mean height of what a node or a lane is joined to
      if (item.joins) { return (middle(place.get(item.joins[0])) + middle(place.get(item.joins[1]))) / 2; }
      let sum = 0, weight = 0;
      const add = (other, edge) => {
        if (!place.has(other)) { return; }
        sum += strength(edge[STRENGTH]) * middle(place.get(other));
        weight += strength(edge[STRENGTH]);
      };
      into[item].forEach((edge) => add(edge[FROM], edge));
      outOf[item].forEach((edge) => add(edge[TO], edge));
      return weight ? sum / weight : middle(place.get(item));
    }

    function draw() {
      const focused = document.activeElement && stage.contains(document.activeElement) ? +document.activeElement.dataset.at : null;
      const shown = shownNodes(), plan = layout(shown);
      stage.replaceChildren(lines);
      lines.replaceChildren();
      stage.style.width = plan.across + 'px';
      stage.style.height = plan.down + 'px';
      stage.style.setProperty('--print', Math.min(1, 660 / plan.across));
      lines.setAttribute('width', plan.across);
      lines.setAttribute('height', plan.down);
      plan.columns.forEach((layer, place) => {
        const heading = make(stage, 'div', 'column', layer < 0 ? 'in' : layer === Infinity ? 'out' : 'layer ' + layer);
        heading.style.left = place * plan.pitch + 'px';
        heading.style.width = plan.width + 'px';
      });
      if (plan.banded) { drawBands(plan, shown); }
      graph.edges.forEach((edge) => {
        if (shown.has(edge[FROM]) && shown.has(edge[TO])) { drawEdge(edge, plan); }
      });
      buttons = new Map();
      [...shown].sort((a, b) => plan.place.get(a).x - plan.place.get(b).x || plan.place.get(a).y - plan.place.get(b).y)
        .forEach((at) => drawNode(at, plan.place.get(at)));
      if (focused !== null) { (buttons.get(focused) || buttons.get(end) || [...buttons.values()][0]).focus(); }
      output.textContent = (shown.size - (end >= 0)) + ' of ' + order.length + '; paths through them add up to ' +
        number(covered(shown)) + ' of ' + number(graph.value);
      slider.setAttribute('aria-valuetext', output.textContent);
      aim(pinned);
    }
    function drawBands(plan, shown) {
      const named = new Set([...shown].filter((at) => column(at) < 0).map((at) => graph.nodes[at][POSITION]));
      plan.rows.forEach((row, place) => {
        const band = make(stage, 'div', 'band' + (place % 2 ? '' : ' odd'));
        band.style.top = plan.tops[place] - 6 + 'px';
        band.style.height = plan.tall[place] + 12 + 'px';
        band.style.left = '-6px';
        band.style.right = '-6px';
        if (row !== null && !named.has(row)) { make(band, 'span', '', quoted(graph.prompt[row])).style.maxWidth = plan.width + 'px'; }
      });
    }
    function drawEdge(edge, plan) {
      const a = plan.place.get(edge[FROM]), b = plan.place.get(edge[TO]), line = document.createElementNS(SVG, 'path');
      if (a.x === b.x) {  // a head and a neuron of one layer
        const y1 = middle(a), y2 = middle(b), bulge = a.x - 14 - Math.min(24, Math.abs(y2 - y1) / 6);
        line.setAttribute('d', `M${a.x},${y1}C${bulge},${y1} ${bulge},${y2} ${b.x},${y2}`);
      } else {
        let x = a.x + a.width, y = middle(a), drawn = `M${x},${y}`;
        [...(plan.routes.get(edge) || []).map((lane) => plan.place.get(lane)), b].forEach((next) => {
          const bend = Math.max(26, Math.min(110, (next.x - x) / 2)), height = middle(next);
          drawn += `C${x + bend},${y} ${next.x - bend},${height} ${next.x},${height}`;
          if (next !== b) { drawn += `H${next.x + next.width}`; }
          x = next.x + next.width;
          y = height;
        });
        line.setAttribute('d', drawn);
      }
      line.setAttribute('stroke-width', Math.max(0.7, WIDEST * strength(edge[STRENGTH]) / most.edge).toFixed(2));
      if (edge[STRENGTH] < 0) { line.setAttribute('class', 'lowers'); }
      line.edge = edge;
      const title = document.createElementNS(SVG, 'title');
      title.textContent = name(edge[FROM]) + ' \u2192 ' + name(edge[TO]) + ': ' + number(edge[STRENGTH], true);
      line.appendChild(title);
      lines.appendChild(line);
    }
    function drawNode(at, spot) {
      const node = graph.nodes[at], one = make(stage, 'button', 'node' + (at === end ? ' end' : ''));
      one.type = 'button';
      one.dataset.at = at;
      one.tabIndex = at === (pinned === null ? end : pinned) ? 0 : -1;
      one.style.transform = `translate(${spot.x}px, ${spot.y}px)`;
      one.style.width = spot.width + 'px';
      one.style.height = spot.height + 'px';
      one.style.setProperty('--sign', node[FLOW] < 0 ? 'var(--lowers)' : 'var(--raises)');
      one.style.setProperty('--fill', (4 + 24 * Math.min(1, strength(node[FLOW]) / most.node)).toFixed(1));
      make(one, 'b', '', label(at));
      make(one, 'data', '', brief(node[FLOW])).value = node[FLOW];
      const about = caption(at);
      if (about) { make(one, 'small', '', about); }
      one.setAttribute('aria-label', label(at) + ', ' + KINDS[node[KIND]] + where(node) + ': ' + number(node[FLOW], true));
      if (at === pinned) { one.classList.add('pinned'); one.setAttribute('aria-pressed', 'true'); }
      if (matching.has(at)) { one.classList.add('found'); }
      buttons.set(at, one);
    }
    function caption(at) {  // what a node is about, in its second line
      const known = data.units[label(at)];
      if (at === end) { return graph.likely === null ? '' : percent(graph.likely) + ' likely'; }
      if (graph.nodes[at][KIND] === 'position') { return quoted(graph.prompt[graph.nodes[at][POSITION]]); }
      if (known && known[1].length) { return '\u2192 ' + known[1].slice(0, 3).map(([token]) => quoted(token)).join(' '); }
      return '';
    }
    function where(node) {
      return node[POSITION] === null || graph.prompt.length < 2 ? ''
        : ' at position ' + node[POSITION] + ' (' + quoted(graph.prompt[node[POSITION]]) + ')';
    }

    // --- looking at a node or a path ---

    function aim(at) {  // highlight a node with its edges; null: nothing
      aimed = at;
      light(at === null ? null : (edge) => edge[FROM] === at || edge[TO] === at, at === null ? [] : [at]);
    }
    function light(wanted, nodes) {
      stage.classList.toggle('aimed', wanted !== null);
      const near = new Set(nodes);
      [...lines.children].forEach((line) => {
        const hot = wanted !== null && wanted(line.edge);
        line.classList.toggle('hot', hot);
        if (hot) { near.add(line.edge[FROM]); near.add(line.edge[TO]); }
      });
      buttons.forEach((one, at) => one.classList.toggle('near', near.has(at)));
    }
    function look(at) { aim(at); describe(at); }
    function leave() { aim(pinned); if (pinned !== null) { describe(pinned); } }

    function describe(at) {
      const node = graph.nodes[at], known = data.units[label(at)];
      panel.replaceChildren();
      panel.classList.add('of-node');
      make(panel, 'h4', '', label(at));
      const place = SOURCES.includes(node[KIND]) || at === end ? '' : ' in layer ' + node[LAYER];
      make(panel, 'p', 'away', (KINDS[node[KIND]] + place + where(node)).replace(/^./, (one) => one.toUpperCase()) + '.');
      const facts = make(panel, 'dl');
      const fact = (name, value) => { make(facts, 'dt', '', name); make(facts, 'dd', '', value); };
      fact(at === end ? 'All paths' : 'Adds along all paths', number(node[FLOW], true));
      if (at !== end) { fact('Directly', number(node[DIRECT], true)); }
      if (strength(node[UNSEEN]) > 0.005 * strength(node[FLOW])) { fact('Of it from nodes not in the list', number(node[UNSEEN], true)); }
      if (node[ACTIVATION] !== null) { fact('Activation', number(node[ACTIVATION])); }
      if (known && known[3] !== null) { fact('Of the target\u2019s information lost without it', percent(known[3])); }
      if (at === end && graph.predictions.length) { likely(); }
      if (known) {
        tokens('Driven by', known[0]);
        tokens('Raises the logits of', known[1]);
        tokens('Lowers the logits of', known[2]);
      }
      neighbours('Comes from', into[at], FROM);
      neighbours('Goes to', outOf[at], TO);
      if (chips && !SOURCES.includes(node[KIND]) && at !== end) { served(graph.nodes[at][LABEL]); }
      if (at !== end) {
        const acts = make(panel, 'div', 'acts');
        button(acts, at === pinned ? 'Unpin' : 'Pin', () => pin(at));
        button(acts, 'Expand', () => expand(at));
        button(acts, 'Hide', () => hide(at));
      }
    }
    function button(parent, text, act) { make(parent, 'button', '', text).addEventListener('click', act); }
    function tokens(heading, pairs) {
      if (!pairs.length) { return; }
      make(panel, 'h5', '', heading);
      const box = make(panel, 'div');
      pairs.slice(0, 8).forEach(([token, value]) => { make(box, 'span', 'chip', quoted(token)).title = number(value, true); });
    }
    function neighbours(heading, edges, side) {
      if (!edges.length) { return; }
      make(panel, 'h5', '', heading);
      edges.slice(0, LISTED).forEach((edge) => {
        const other = edge[side];
        row(name(other), edge[STRENGTH], () => { reveal([other]); pin(other, true); }, !buttons.has(other));
      });
      if (edges.length > LISTED) { make(panel, 'p', 'away', 'and ' + (edges.length - LISTED) + ' more'); }
    }
    function row(text, value, act, away) {
      const one = make(panel, 'button', 'row' + (away ? ' away' : ''));
      one.type = 'button';
      make(one, 'span', '', text + (away ? ' (hidden)' : ''));
      make(one, 'data', '', number(value, true)).value = value;
      one.addEventListener('click', act);
      return one;
    }
    function likely() {
      make(panel, 'h5', '', 'Most likely next');
      graph.predictions.slice(0, LISTED).forEach(([token, probability]) => {
        const one = make(panel, 'div', 'row');
        make(one, 'span', '', quoted(token));
        make(one, 'data', '', percent(probability)).value = probability;
      });
    }
    function served(labelPlace) {  // the tokens of an atlas in whose graphs a node is
      const found = data.graphs.map((one, at) => [one, at]).filter(([one]) => one.nodes.some((node) => node[LABEL] === labelPlace));
      make(panel, 'h5', '', 'Among the strongest nodes after ' + found.length + ' of ' + data.graphs.length + ' tokens');
      const box = make(panel, 'div', 'chips');
      found.slice(0, 24).forEach(([one, at]) => button(box, quoted(one.prompt[one.position]), () => pick(at)));
    }
    function overview() {
      panel.replaceChildren();
      panel.classList.remove('of-node');
      likely();
      if (!graph.paths.length) { return; }
      make(panel, 'h5', '', 'Strongest paths');
      graph.paths.slice(0, 10).forEach(([value, , nodes, labels]) => {
        const one = row(labels.map((place) => data.labels[place]).join(' \u2192 '), value, () => {
          reveal(nodes.filter((at) => at >= 0));
          along(nodes);
        });
        one.addEventListener('pointerenter', () => along(nodes));
        one.addEventListener('pointerleave', () => aim(pinned));
      });
    }
    function along(nodes) {
      light((edge) => nodes.some((at, place) => place && edge[TO] === at && edge[FROM] === nodes[place - 1]), nodes);
    }

    // --- what a reader can do ---

    function pin(at, stays) {
      pinned = pinned === at && !stays ? null : at;
      draw();
      describe(at);
    }
    function reveal(nodes) { nodes.forEach((at) => { extra.add(at); hidden.delete(at); }); draw(); }
    function expand(at) {
      const shown = shownNodes();
      const others = [...into[at].map((edge) => [edge, edge[FROM]]), ...outOf[at].map((edge) => [edge, edge[TO]])]
        .filter(([, other]) => !shown.has(other));
      others.sort(([a], [b]) => strength(b[STRENGTH]) - strength(a[STRENGTH]));
      pinned = at;
      reveal(others.slice(0, NEIGHBOURS).map(([, other]) => other));
      describe(at);
    }
    function hide(at) {
      if (at === end) { return; }
      hidden.add(at);
      extra.delete(at);
      if (pinned === at) { pinned = null; }
      draw();
      overview();
    }
    function seek() {  // highlight the nodes that a token is in
      const words = search.value.toLowerCase();
      const has = (text) => text.toLowerCase().includes(words);
      const found = !words ? [] : order.filter((at) => {
        const known = data.units[label(at)];
        return has(label(at)) || (known && (known[0].some(([token]) => has(token)) || known[1].some(([token]) => has(token))));
      });
      matching = new Set(found);
      reveal(found.slice(0, MATCHES));
      if (words) { output.textContent += '; ' + found.length + ' match'; }
    }
    function matches() {  // chips of the tokens that are sought, best first
      const words = search.value.toLowerCase();
      chips.childNodes.forEach((chip) => { chip.hidden = !chip.dataset.token.toLowerCase().includes(words); });
      const fit = (chip) => [search.value, ' ' + search.value].includes(chip.dataset.token) ? 0
        : chip.dataset.token.trim().toLowerCase() === words.trim() ? 1 : 2;
      return [...chips.childNodes].filter((chip) => !chip.hidden).sort((a, b) => fit(a) - fit(b));
    }
    function pick(place) {
      search.value = '';
      matches();
      choose(place);
      const says = find('.says');
      [...says.children].forEach((one, at) => { one.textContent = graph.says[at]; });
      tables();
      chips.childNodes[place].scrollIntoView({block: 'nearest'});
    }
    function tables() {
      fill('.paths', graph.paths.map(([value, share, , labels]) =>
        [labels.map((place) => data.labels[place]).join(' \u2192 '), value, percent(share)]));
      fill('.nodes', [...order, ...(end >= 0 ? [end] : [])].map((at) => {
        const node = graph.nodes[at], known = data.units[label(at)] || [[], [], []];
        const named = (pairs) => pairs.slice(0, 5).map(([token]) => quoted(token)).join(' ');
        return [label(at), node[POSITION] === null ? '' : node[POSITION] + ' ' + quoted(graph.prompt[node[POSITION]]),
                node[DIRECT], node[FLOW], node[ACTIVATION] === null ? '' : node[ACTIVATION], ...known.slice(0, 3).map(named)];
      }));
    }
    function fill(name, rows) {
      const body = find(name + ' tbody');
      body.replaceChildren();
      rows.forEach((cells) => {
        const line = make(body, 'tr');
        cells.forEach((value, at) => {
          const isNumber = typeof value === 'number';
          const cell = make(line, at ? 'td' : 'th', isNumber ? 'n' : '', isNumber ? number(value) : value);
          if (!at) { cell.scope = 'row'; }
        });
      });
    }
    function move(at, key) {  // to the neighbour in the direction of an arrow key
      const across = {ArrowLeft: [into[at], FROM], ArrowRight: [outOf[at], TO]}[key];
      let next;
      if (across) {
        const edge = across[0].find((one) => buttons.has(one[across[1]]));
        next = edge && edge[across[1]];
      } else {
        const mates = [...buttons.keys()].filter((one) => column(one) === column(at));
        next = mates[mates.indexOf(at) + (key === 'ArrowDown' ? 1 : -1)];
      }
      if (next === undefined) { return; }
      buttons.get(at).tabIndex = -1;
      buttons.get(next).tabIndex = 0;
      buttons.get(next).focus();
      look(next);
    }

    const nodeOf = (event) => { const one = event.target.closest('.node'); return one ? +one.dataset.at : null; };
    let finger = false;
    stage.addEventListener('pointerdown', (event) => { finger = event.pointerType === 'touch'; });
    stage.addEventListener('pointerover', (event) => {
      const at = nodeOf(event);
      if (event.pointerType !== 'touch' && at !== null && at !== aimed) { look(at); }
    });
    stage.addEventListener('pointerout', (event) => {
      if (event.pointerType !== 'touch' && nodeOf(event) !== null && !event.target.closest('.node').contains(event.relatedTarget)) { leave(); }
    });
    stage.addEventListener('focusin', (event) => {
      const at = nodeOf(event);
      if (at !== null && at !== aimed && event.target.matches(':focus-visible')) { look(at); }
    });
    stage.addEventListener('click', (event) => {
      const at = nodeOf(event);
      if (at === null || event.detail > 1) { return; }
      if (finger && aimed !== at) { look(at); } else { pin(at); }  // the first tap tells, the second pins
    });
    stage.addEventListener('dblclick', (event) => { if (nodeOf(event) !== null) { expand(nodeOf(event)); } });
    board.addEventListener('keydown', (event) => {
      const at = nodeOf(event);
      if (event.ctrlKey || event.metaKey || event.altKey) { return; }
      if (event.key === 'Escape') { reset(); } else if (at === null) { return; }
      else if (event.key.startsWith('Arrow')) { move(at, event.key); }
      else if (event.key.toLowerCase() === 'e') { expand(at); }
      else if (event.key.toLowerCase() === 'h') { hide(at); }
      else { return; }
      event.preventDefault();
    });
    slider.addEventListener('input', () => { extra.clear(); hidden.clear(); draw(); });
    find('.reset').addEventListener('click', reset);
    if (chips) {
      data.graphs.forEach((one, place) => {
        const token = one.prompt[one.position], chip = make(chips, 'button', '', quoted(token));
        chip.type = 'button';
        chip.dataset.graph = place;
        chip.dataset.token = token;
        if (one.count !== undefined) { chip.title = 'occurs ' + one.count.toLocaleString('en') + ' times'; }
        chip.addEventListener('click', () => pick(place));
      });
      search.addEventListener('input', matches);
      search.addEventListener('keydown', (event) => {
        if (event.key === 'Enter' && matches().length) { pick(+matches()[0].dataset.graph); }
      });
    } else {
      search.addEventListener('input', seek);
    }
    let wide = 0;
    new ResizeObserver(() => {
      if (board.clientWidth !== wide && board.clientWidth) { wide = board.clientWidth; draw(); }
    }).observe(board);
    find('.drawn').hidden = false;
    wide = board.clientWidth;
    choose(data.first);
  }
})();
