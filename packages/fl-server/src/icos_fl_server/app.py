"""The ServerApp: settings in, a run with its history, and a reason whenever it ends early."""

from pathlib import Path

import structlog
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from icos_fl_service import logs

from icos_fl_server import metrics
from icos_fl_server.checkpoints import Checkpoints
from icos_fl_server.errors import ServerError
from icos_fl_server.federation import Federation
from icos_fl_server.history import History
from icos_fl_server.model_state import ModelStates
from icos_fl_server.quiesce import Quiesced, Request
from icos_fl_server.settings import RunConfig, parse
from icos_fl_server.tracking import Tracking

app = ServerApp()

log = structlog.get_logger()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run configuration asks for."""
    logs.configure()
    raw = context.run_config
    folder = Path(str(raw.get("result-dir", RunConfig.model_fields["result_dir"].default)))
    request = Request(folder)
    with request.awaited():
        _run(grid, context, folder, request)


def _run(grid: Grid, context: Context, folder: Path, request: Request) -> None:
    raw = context.run_config
    history = History(folder, str(context.run_id))
    tracking: Tracking | None = None
    try:
        config = parse(raw)
        history.plan(config.metric, config.num_server_rounds)
        tracking = Tracking(config.metric, dict(raw), enabled=config.use_wandb)
        checkpoints = Checkpoints(folder / "checkpoints", raw)
        states = ModelStates(config.store, raw)
        with metrics.told(history.facts, config.metrics_address):
            Federation(grid, config, history, checkpoints, tracking, states, request).run()
    except Quiesced:
        left = config.num_server_rounds - len(history.facts["rounds"])
        history.end("quiesced", f"asked to; {left} of {config.num_server_rounds} rounds are left")
        log.info("run quiesced", rounds_left=left)
    except BaseException as error:
        reason = _reason(error)
        history.end("failed", reason)
        log.error("run failed", reason=reason)
        raise
    else:
        history.end("finished")
        log.info("run finished", rounds=config.num_server_rounds)
    finally:
        if tracking is not None:
            tracking.end(failed=history.facts["state"] == "failed")


def _reason(error: BaseException) -> str:
    """One line for people."""
    if isinstance(error, ServerError):
        return str(error)
    if isinstance(error, Exception):
        return f"{type(error).__name__}: {error}"
    return "interrupted"
