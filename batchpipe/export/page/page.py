"""From the facts of an output folder to one HTML page: no script, no font and no image from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from html import escape
from typing import Any

from batchpipe.export.page.charts import bar_chart, grid_chart, line_chart, short
from batchpipe.export.page.facts import LENGTH_EDGES, Facts

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --dim: #667085; --paper: #fff; --line: #e4e7ec; --soft: #f6f7f9;
  --c0: #3563c9; --c1: #d97706; --c2: #0f9d76; --c3: #a83d8e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --dim: #98a2b3; --paper: #14171d; --line: #2c323c;
  --soft: #1b2028; --c0: #7ea2f0; --c1: #f0a94b; --c2: #4cc9a0; --c3: #d985c3; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; padding: 2rem;
  max-width: 1400px; }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .7rem; }
.dim, figcaption .legend { color: var(--dim); } .state { margin: .2rem 0 1.4rem; color: var(--dim); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; }
.tile { background: var(--soft); border-radius: 8px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.3rem; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1.4rem; }
figure { margin: 0; } figcaption { display: flex; justify-content: space-between; margin-bottom: .3rem; }
.legend span { margin-left: .9rem; } .legend i { display: inline-block; width: .7em; height: .7em; border-radius: 2px;
  margin-right: .35em; } svg { width: 100%; height: auto; max-height: 340px; }
svg text { font: 10.5px system-ui, sans-serif; fill: var(--dim); } .grid { stroke: var(--line); }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.c0 { fill: var(--c0); background: var(--c0); } .c1 { fill: var(--c1); background: var(--c1); }
.c2 { fill: var(--c2); background: var(--c2); } .c3 { fill: var(--c3); background: var(--c3); }
.line.c0 { stroke: var(--c0); fill: none; } .line.c1 { stroke: var(--c1); fill: none; }
.line.c2 { stroke: var(--c2); fill: none; } .line.c3 { stroke: var(--c3); fill: none; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .35rem .8rem .35rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; } th { font-weight: 500;
  color: var(--dim); } td.number, th.number { text-align: right; white-space: nowrap; }
"""


def render(facts: Facts) -> str:
    name = facts.runs[-1]["job_name"] if facts.runs else facts.address
    sections = [_tiles(facts), _lengths(facts), _errors(facts), _runs(facts)]
    for number, run in enumerate(facts.runs, 1):
        heading = "Over time" if len(facts.runs) == 1 else f"Over time, run {number} of {len(facts.runs)}"
        sections.append(_over_time(heading, run))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} - batchpipe</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(name)}</h1>{_state(facts)}{''.join(sections)}</body></html>\n"
    )


def _state(facts: Facts) -> str:
    state = "finished" if facts.is_finished else "not finished: what is committed so far"
    model = f"{escape(facts.runs[-1]['model'])} on {escape(_devices(facts.runs[-1]))}, " if facts.runs else ""
    return f'<p class="state">{model}{state}. {escape(facts.address)}</p>'


def _devices(run: Mapping[str, Any]) -> str:
    names: Sequence[str] = run["device_names"]
    counts = {name: names.count(name) for name in names}
    return ", ".join(f"{number} x {name}" if number > 1 else name for name, number in counts.items())


def _tiles(facts: Facts) -> str:
    seconds = sum(run["wall_seconds"] for run in facts.runs)
    generated = sum(run["generate_seconds"] for run in facts.runs)
    output_tokens = sum(run["completion_tokens"] for run in facts.runs)
    tiles = [
        ("completions", f"{facts.num_completions:,}"),
        *((status, f"{number:,}") for status, number in sorted(facts.statuses.items()) if status != "succeeded"),
        ("prompt tokens", short(facts.prompt_tokens)),
        ("completion tokens", short(facts.completion_tokens)),
        ("output tokens/s", short(output_tokens / generated) if generated else "-"),
        ("time" if len(facts.runs) == 1 else f"time, {len(facts.runs)} runs", str(timedelta(seconds=round(seconds)))),
        *((f"ended by {reason}", f"{number:,}") for reason, number in sorted(facts.finish_reasons.items())),
    ]
    return '<div class="tiles">' + "".join(_tile(label, text) for label, text in tiles) + "</div>"


def _tile(label: str, text: str) -> str:
    return f'<div class="tile"><b>{escape(text)}</b><span class="dim">{escape(label)}</span></div>'


def _lengths(facts: Facts) -> str:
    if not facts.num_completions:
        return "<h2>Lengths</h2><p>No completions are committed yet.</p>"
    charts = [
        bar_chart(
            "Lengths in tokens",
            LENGTH_EDGES,
            [facts.prompt_lengths, facts.completion_lengths],
            ["prompts", "completions"],
        ),
        grid_chart("Forecast and drawn lengths", LENGTH_EDGES, facts.forecast, "forecast", "drawn"),
    ]
    said = ""
    if facts.drawn_tokens:
        share = facts.predicted_tokens / facts.drawn_tokens - 1
        said = (
            f"<p>Forecast: {facts.predicted_tokens:,} tokens; drawn: {facts.drawn_tokens:,} "
            f"(the forecast was {abs(share):.1%} {'too high' if share > 0 else 'too low'}).</p>"
        )
    return f'<h2>Lengths</h2>{said}<div class="charts">{"".join(charts)}</div>'


def _errors(facts: Facts) -> str:
    if not facts.error_codes:
        return ""
    rows = []
    for code, number in facts.error_codes.most_common():
        examples = "<br>".join(
            f"<b>{escape(one.row_id)}</b>: {escape(one.message)}" for one in facts.examples.get(code, [])
        )
        rows.append(f'<tr><td>{escape(code)}</td><td class="number">{number:,}</td><td>{examples}</td></tr>')
    head = '<tr><th>code</th><th class="number">rows</th><th>such as</th></tr>'
    return f"<h2>Failed rows</h2><table>{head}{''.join(rows)}</table>"


_RUN_COLUMNS = (
    ("started", lambda run: run["started_at"].strftime("%Y-%m-%d %H:%M:%S UTC")),
    ("load", lambda run: f"{run['load_seconds']:.1f} s"),
    ("generate", lambda run: f"{run['generate_seconds']:.1f} s"),
    ("output tokens/s", lambda run: f"{run['output_tokens_per_second']:,.0f}"),
    ("stages busy", lambda run: ", ".join(f"{share:.0%}" for share in run["stage_utilization"])),
    ("preemptions", lambda run: f"{run['preemptions']:,}"),
    ("computed again", lambda run: f"{run['recomputed_tokens']:,} tokens"),
    ("reused", lambda run: f"{run['reused_tokens'] or 0:,} tokens"),
    ("to the device", lambda run: f"{run['host_to_device_bytes'] / 2**30:.2f} GiB"),
    ("waited for KV", lambda run: f"{run['stall_seconds']:.1f} s"),
)


def _runs(facts: Facts) -> str:
    if not facts.runs:
        return "<h2>Runs</h2><p>No run has ended yet.</p>"
    head = "".join(f"<th>{escape(name)}</th>" for name, _ in _RUN_COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(text(run))}</td>" for _, text in _RUN_COLUMNS) + "</tr>" for run in facts.runs
    )
    return f"<h2>Runs</h2><table><tr>{head}</tr>{rows}</table>"


def _over_time(heading: str, run: Mapping[str, Any]) -> str:
    samples: Sequence[Mapping[str, float]] = run["timeline"] or ()
    if len(samples) < 2:
        return ""
    times = [sample["seconds"] for sample in samples]

    def rates(name: str, parts: float = 1.0) -> list[float]:
        """By second, between each sample and the one before it."""
        found = [0.0]
        for before, after in zip(samples, samples[1:], strict=False):
            seconds = after["seconds"] - before["seconds"]
            found.append((after[name] - before[name]) / seconds / parts if seconds > 0 else 0.0)
        found[0] = found[1]
        return found

    def values(name: str) -> list[float]:
        return [sample[name] for sample in samples]

    stages = max(1, run["num_stages"] * run["num_replicas"])
    kv = [("on the device", values("device_blocks"))]
    if any(values("host_blocks")):
        kv.append(("in host memory", values("host_blocks")))
    charts = [
        line_chart("Output tokens/s", times, [("output", rates("output_tokens"))], unit="tokens/s"),
        line_chart("Prompt tokens/s", times, [("prompts", rates("prompt_tokens"))], unit="tokens/s"),
        line_chart("Rows done", times, [("rows", values("rows"))], unit="rows"),
        line_chart(
            "Sequences", times, [("running", values("running")), ("waiting", values("waiting"))], unit="sequences"
        ),
        line_chart("KV blocks in use", times, kv, unit="blocks", top=float(run["peak_device_blocks"])),
        line_chart("Stages busy", times, [("share of the time", rates("busy_seconds", stages))], unit="", top=1.0),
    ]
    return f'<h2>{escape(heading)}</h2><div class="charts">{"".join(charts)}</div>'
