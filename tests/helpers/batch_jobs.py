"""Batch jobs of servers in processes of their own, which are killed, or given very many records."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from motet.runtime.client.batch import BatchClient

from helpers.servers import until


def ended(client, job_id):
    """Every result of a job, by record, when it has ended."""
    found, job = {}, None
    for job, results in client.watch(job_id):  # noqa: B007
        for result in results:
            assert result.id not in found, "answered twice"
            found[result.id] = result
    assert job.has_ended
    return job, found


def serve(bundle, state):
    command = [sys.executable, "-m", "motet.cli", "serve", str(bundle), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [*command, "--state-dir", str(state)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return process, process.stdout.readline().split()[-1]


def killed_and_undisturbed(bundle, folder, count, kills, seed):
    """The results of a job whose server was killed some times, and of the same one whose server was not."""
    rng = random.Random(seed)
    task = [(f"r{i}", {"prompt": f"text number {i}", "max_tokens": 24, "temperature": 0.8}) for i in range(count)]
    found = []
    for times in (kills, 0):
        job_id, state = None, folder / f"state-{times}"
        for attempt in range(times + 1):
            process, address = serve(bundle, state)
            try:
                with BatchClient(address) as client:
                    if job_id is None:
                        job_id = client.submit("/v1/completions", task).id
                    if attempt < times:
                        goal = min(count - 1, client.get(job_id).done + rng.randrange(1, max(2, count // (times + 1))))
                        until(lambda: client.get(job_id).done >= goal, 120)  # noqa: B023
                        time.sleep(rng.random() * 0.02)
                        process.send_signal(signal.SIGKILL)
                        continue
                    job, results = ended(client, job_id)
                    assert (job.state, job.done) == ("done", count)
                    found.append({name: result.response["choices"][0]["text"] for name, result in results.items()})
            finally:
                process.kill()
                process.wait()
    return found


def memory_of_a_submission(bundle, state, count):
    """MiB that the server holds at most, while and after it takes so many records of two KB each."""
    process, address = serve(bundle, state)
    try:
        with BatchClient(address) as client:
            text = "word " * 400
            records = ((f"r{i}", {"prompt": f"{text} {i}", "max_tokens": 1}) for i in range(count))
            job = client.submit("/v1/completions", records)
            assert client.get(job.id).total == count
            status = Path(f"/proc/{process.pid}/status").read_text()
            client.cancel(job.id)
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    finally:
        process.kill()
        process.wait()
