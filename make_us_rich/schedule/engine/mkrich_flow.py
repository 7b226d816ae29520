"""The two flows that a Prefect worker runs. It lives in Prefect's own environment and knows of Make Us Rich only the program `mkrich`.

`mkrich fleet worker` starts the worker and sets MKRICH (the program) and MUR_* (where candles, models and the ledger are).
"""

import datetime
import json
import os
import subprocess

from prefect import flow, get_client, runtime
from prefect.client.schemas.filters import DeploymentFilter, FlowFilter, FlowRunFilter
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Completed, Crashed, Failed

OPEN = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING]
WORDS = {2: "settings", 3: "no data", 4: "refused by the gate"}


def mkrich(*words, told=None):
    "Run the program; its exit code, and the JSON that it printed."
    done = subprocess.run([os.environ.get("MKRICH", "mkrich"), "fleet", *words], input=json.dumps(told), stdout=subprocess.PIPE, text=True)
    try:
        return done.returncode, json.loads(done.stdout)
    except ValueError:
        return done.returncode or 1, {"reason": f"mkrich ended with exit code {done.returncode} and said nothing"}


@flow(name="mkrich-train", flow_run_name="{key}", retries=0)  # what is worth another try, and when, is in the ledger: see sweep
def train(key: str, entry: dict, feed: list):
    "One run of one pair."
    code, outcome = mkrich("train", "--ticket", runtime.flow_run.id, told={"entry": entry, "feed": feed})
    message = f"{outcome.get('state', WORDS.get(code, 'failed'))}: {outcome.get('version') or ''} {outcome.get('reason') or ''}".strip()
    return Completed(message=message, name="Completed" if code == 0 else "Refused") if code in (0, 4) else Failed(message=message)


async def newest_crash(client, deployment):
    "Id of the newest crashed run of a deployment: a run that died before it reached the ledger has the same ticket as its successor."
    lost = FlowRunFilter(state={"type": {"any_": [StateType.CRASHED]}})
    of_it = DeploymentFilter(id={"any_": [deployment]})
    found = await client.read_flow_runs(deployment_filter=of_it, flow_run_filter=lost, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)
    return found[0].id if found else ""


@flow(name="mkrich-sweep", flow_run_name="sweep", retries=0)
async def sweep(pairs: list, pretrain: str = "", grace: float = 60):
    "Start what the ledger says is missing; take the slots back that dead hosts hold."
    async with get_client() as client:
        ours = FlowFilter(name={"any_": ["mkrich-train", "mkrich-sweep"]})
        now = datetime.datetime.now(datetime.UTC)
        due = FlowRunFilter(state={"type": {"any_": OPEN}}, expected_start_time={"before_": now})
        seen = await client.read_flow_runs(flow_filter=ours, flow_run_filter=due, limit=200)
        old = [r for r in seen if r.state_type != StateType.SCHEDULED and (now - r.state.timestamp).total_seconds() > grace]
        code, answer = mkrich("plan", "--json", told={"pairs": pairs, "pretrain": pretrain, "tickets": [str(r.id) for r in old]})
        if code:
            return Failed(message=answer["reason"])
        dead = [r for r in old if str(r.id) not in answer["held"] and str(r.id) != runtime.flow_run.id]
        crashed = []
        for run in dead:
            again = await client.read_flow_run(run.id)
            if again.state.id == run.state.id:
                await client.set_flow_run_state(run.id, Crashed(message="the host or the process of this run is gone"), force=True)
                crashed.append(run.id)
        busy = {r.deployment_id for r in seen if r.id not in crashed}
        for wanted in answer["wanted"]:
            deployment = await client.read_deployment_by_name(f"mkrich-train/{wanted['key'].replace('/', '.')}")
            if deployment.id not in busy:
                key = f"{wanted['ticket']}/{await newest_crash(client, deployment.id)}"
                await client.create_flow_run_from_deployment(deployment.id, idempotency_key=key)
        return Completed(message=f"{len(answer['wanted'])} wanted, {len(crashed)} dead")
