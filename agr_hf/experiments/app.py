"""`agr-hf app`: trajectories, AGR's effect on a model's layers, and reports of comparisons, in a browser.

This is the interface, of Gradio; what it shows comes from views.py.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from agr_hf.errors import UserError
from agr_hf.experiments import charts
from agr_hf.experiments.views import (
    DEMO_MODEL,
    MAX_BATCH_SIZE,
    MAX_BATCHES,
    MAX_STEPS,
    find_comparisons,
    find_models,
    show_layers,
    show_report,
    show_trajectories,
)
from agr_hf.optim.registry import OPTIMIZERS, list_optimizers
from agr_hf.tasks.functions import FUNCTIONS

STYLE = f"""<style>
.agr-chart {{ {charts.LIGHT} color: var(--ink); line-height: 1.5; overflow-wrap: anywhere; }}
.dark .agr-chart {{ {charts.DARK} }}
.agr-chart.agr-chart {{
{charts.RULES}
svg {{ width: 100%; max-width: 40rem; height: auto; display: block; }}
svg.sample {{ width: 2.25rem; height: .875rem; display: inline-block; }}
.contour {{ stroke: var(--soft); stroke-width: .7; opacity: .55; }} .soft {{ color: var(--soft); }}
p {{ margin: .5rem 0; }} figure {{ margin: .5rem 0; }} .scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; margin: .75rem 0; font-size: .875rem; }}
caption {{ text-align: left; color: var(--soft); padding-bottom: .3rem; }}
th, td {{ text-align: left; font-weight: normal; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }}
thead th {{ font-weight: 600; white-space: normal; vertical-align: bottom; overflow-wrap: normal; }}
th:has(code) {{ white-space: normal; min-width: 9rem; }} tr > :last-child {{ padding-right: 0; }}
th.number, td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
code {{ font: .875em ui-monospace, monospace; }}
iframe {{ width: 100%; height: 80vh; border: 1px solid var(--line); border-radius: 6px; color-scheme: light; }}
@media (max-width: 500px) {{ svg text {{ font-size: 15px; }} }}
}}
.dark .agr-chart iframe {{ color-scheme: dark; }}
input[role=listbox] {{ text-overflow: ellipsis; }}
</style>"""


def build_app(root: Path) -> Any:
    """The interface as Gradio's `Blocks`; `run_app` and a Space start it.

    Args:
        root: the folder below which models and comparisons are read.

    Raises:
        UserError: there is no such folder, or Gradio is not installed.
    """
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise UserError(
            "gradio is not installed; install what agr-hf app needs, in a checkout of agr_hf: pip install '.[app]'"
        ) from error
    if not root.is_dir():
        raise UserError(
            f"there is no folder {str(root)!r}; give one with models and comparisons, or none for this folder"
        )

    def in_a_sentence(show: Callable[..., str], *arguments: Any) -> str:
        try:
            return show(*arguments)
        except UserError as error:
            raise gradio.Error(escape(str(error)), duration=None, print_exception=False) from None

    def on_trajectories(function: str, steps: float, animated: bool, *fields: Any) -> str:
        rows = list(zip(fields[::2], fields[1::2], strict=True))
        return in_a_sentence(show_trajectories, function, rows, steps, animated)

    def on_layers(name: str, batches: float, batch_size: float, progress: Any = gradio.Progress()) -> str:  # noqa: B008
        done = iter(range(1, MAX_BATCHES + 1))
        return in_a_sentence(
            show_layers,
            root,
            name or "",
            batches,
            batch_size,
            lambda: progress((next(done), int(batches)), unit="batches"),
        )

    def on_report(name: str | None) -> str:
        return in_a_sentence(show_report, root, name)

    def on_load() -> tuple[Any, Any, Any]:
        comparisons = find_comparisons(root)
        return (
            gradio.update(choices=[DEMO_MODEL, *find_models(root)]),
            gradio.update(
                choices=comparisons, value=comparisons[0] if comparisons else None, visible=bool(comparisons)
            ),
            gradio.update(visible=not comparisons),
        )

    optimizers = [(OPTIMIZERS[name].title, name) for name in list_optimizers()]
    first = [("adamw", 0.1), ("agr_adamw", 0.1), ("adal", 0.1), (None, 0.1)]
    with gradio.Blocks(title="AGR and AdaL", analytics_enabled=False) as app:
        gradio.Markdown("# AGR and AdaL\nOptimizers that use the l1 norm of each layer’s gradient.")
        with gradio.Tab("Trajectories"), gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                function = gradio.Dropdown(list(FUNCTIONS), value="rosenbrock", label="Function")
                fields: list[Any] = []
                for index, (name, rate) in enumerate(first):
                    with gradio.Row():
                        chosen = gradio.Dropdown(
                            [("none", ""), *optimizers],
                            value=name or "",
                            label=f"Optimizer {index + 1}",
                            scale=3,
                            min_width=170,
                        )
                        fields += [
                            chosen,
                            gradio.Number(rate, label="Learning rate", minimum=0, scale=2, min_width=110),
                        ]
                steps = gradio.Slider(10, MAX_STEPS, value=200, step=10, label="Steps")
                animated = gradio.Checkbox(True, label="Draw step by step")
                run = gradio.Button("Run", variant="primary")
            with gradio.Column(scale=3, min_width=300):
                picture = gradio.HTML(elem_id="trajectories", apply_default_css=False)
        with gradio.Tab("Layers"), gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                model = gradio.Dropdown(
                    [DEMO_MODEL], value=DEMO_MODEL, label="Model", allow_custom_value=True,
                    info="From the list, or an architecture of timm (resnet18) or a Hub id (user/name)",
                )  # fmt: skip
                batches = gradio.Slider(2, MAX_BATCHES, value=8, step=1, label="Batches")
                batch_size = gradio.Slider(1, MAX_BATCH_SIZE, value=8, step=1, label="Examples in a batch")
                measured = gradio.Button("Measure", variant="primary")
            with gradio.Column(scale=3, min_width=300):
                layers = gradio.HTML(elem_id="layers", apply_default_css=False)
        with gradio.Tab("Reports"):
            comparison = gradio.Dropdown([], label="Comparison")
            empty = gradio.Markdown(
                "There is no comparison in the folder of the app. This command makes one in minutes; then reload the page: "
                "`agr-hf compare functions --optim adamw adal --seeds 8 --output comparisons/first`",
                visible=False,
            )
            report = gradio.HTML(elem_id="report", apply_default_css=False)
        private: Any = {"api_visibility": "private"}
        ways = [function, steps, animated, *fields]
        run.click(on_trajectories, ways, picture, **private)
        measured.click(on_layers, [model, batches, batch_size], layers, **private)
        comparison.change(on_report, comparison, report, **private)
        app.load(on_load, None, [model, comparison, empty], **private)
        app.load(on_trajectories, ways, picture, **private)
    # One computation at a time: each may take all cores.
    app.queue(max_size=16, default_concurrency_limit=1)
    return app


def run_app(root: Path, port: int | None = None) -> None:
    """Serve the app until it is interrupted, on this machine only unless GRADIO_SERVER_NAME says otherwise.

    Args:
        root: the folder below which models and comparisons are read.
        port: of the server; None takes the first free one from 7860 on.
    """
    app, address = start_app(root, port)
    print(f"The app is at {address}. Stop it with Ctrl-C.")
    app.block_thread()


def start_app(root: Path, port: int | None = None) -> tuple[Any, str]:
    """Start the app in a thread of its own; returns it and its address.

    Raises:
        UserError: see `build_app`; or the port is in use.
    """
    app = build_app(root)
    import gradio

    # Fonts of the system: no network.
    theme = gradio.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    try:
        _, address, _ = app.launch(
            share=False, server_port=port, prevent_thread_lock=True, quiet=True, ssr_mode=False, footer_links=[],
            theme=theme, head=STYLE, max_file_size="1mb",
        )  # fmt: skip
    except OSError as error:
        given = "no port from 7860 on is free" if port is None else f"port {port} is in use"
        raise UserError(f"{given}; choose another one with --port ({error})") from error
    return app, address
