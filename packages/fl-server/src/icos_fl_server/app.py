"""The ServerApp: settings in, a run with its history, and a reason whenever it ends early."""

import structlog
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from icos_fl_server.checkpoints import Checkpoints
from icos_fl_server.errors import ServerError
from icos_fl_server.federation import Federation
from icos_fl_server.history import History
from icos_fl_server.settings import parse
from icos_fl_server.tracking import Tracking

app = ServerApp()

log = structlog.get_logger()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run configuration asks for."""
    config = parse(context.run_config)
    history = History(
        config.result_dir, str(context.run_id), config.metric, config.num_server_rounds
    )
    tracking = None
    try:
        tracking = Tracking(config.metric, dict(context.run_config), enabled=config.use_wandb)
        checkpoints = Checkpoints(config.result_dir / "checkpoints", context.run_config)
        Federation(grid, config, history, checkpoints, tracking).run()
    except BaseException as error:
        reason = (
            str(error) if isinstance(error, ServerError) else f"{type(error).__name__}: {error}"
        )
        history.end("failed", reason)
        log.error("run failed", reason=reason)
        raise
    else:
        history.end("finished")
        log.info("run finished", rounds=config.num_server_rounds)
    finally:
        if tracking is not None:
            tracking.end(failed=history.facts["state"] == "failed")
