"""Bring a Prefect server in step with a list of deployments (JSON on the standard input); prints what it did as JSON.

Run by `mkrich deploy-schedule` with the Python of Prefect's own environment.
"""

import asyncio
import contextlib
import datetime
import json
import sys

import mkrich_flow
from prefect import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, FlowFilter
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.deployments.runner import EntrypointType
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def schedule_of(facts):
    if "cron" in facts:
        return CronSchedule(cron=facts["cron"], timezone="UTC")
    first = EPOCH + datetime.timedelta(seconds=facts["offset"])
    return IntervalSchedule(interval=datetime.timedelta(seconds=facts["every"]), anchor_date=first, timezone="UTC")


async def queue(client, pool, name, priority, limit):
    try:
        found = await client.read_work_queue_by_name(name, work_pool_name=pool)
        await client.update_work_queue(found.id, concurrency_limit=limit, priority=priority)
    except ObjectNotFound:
        await client.create_work_queue(name, work_pool_name=pool, priority=priority, concurrency_limit=limit)


async def register(told):
    pool, done = told["pool"], []
    async with get_client() as client:
        with contextlib.suppress(ObjectAlreadyExists):
            await client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        await queue(client, pool, "sweep", 1, None)  # of its own, without a limit: it must run when the slots are taken by the dead
        await queue(client, pool, "train", 2, told["limit"])
        for item in told["deployments"]:
            flow = getattr(mkrich_flow, item["flow"])
            deployment = await flow.to_deployment(
                item["name"], parameters=item["parameters"], schedules=[schedule_of(s) for s in item["schedules"]], tags=["mkrich"],
                work_pool_name=pool, work_queue_name=item["flow"], entrypoint_type=EntrypointType.MODULE_PATH, description=item["description"],
            )
            await deployment.apply()
            done.append(f"{flow.name}/{item['name']}")
        names = FlowFilter(name={"any_": ["mkrich-train", "mkrich-sweep"]})
        removed = []
        for old in await client.read_deployments(flow_filter=names, deployment_filter=DeploymentFilter(tags={"all_": ["mkrich"]}), limit=200):
            flow = await client.read_flow(old.flow_id)
            if old.work_pool_name == pool and f"{flow.name}/{old.name}" not in done:
                await client.delete_deployment(old.id)
                removed.append(f"{flow.name}/{old.name}")
    return {"deployed": done, "removed": removed}


print(json.dumps(asyncio.run(register(json.load(sys.stdin)))))
