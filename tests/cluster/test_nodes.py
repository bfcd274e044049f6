"""Nodes that come and go while a job runs."""

from __future__ import annotations

import json
import threading
import time

import pytest
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.cluster import jobs
from motet.runtime.jobs.parts import Parts
from motet.runtime.jobs.work import JobReport, RequestWork
from ray.cluster_utils import Cluster


@pytest.mark.slow
def test_a_node_is_added_and_one_removed(tiny_model_dir, tmp_path):
    bundle = export_bundle(tiny_model_dir("llama"), tmp_path / "tiny")
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"id": f"r{i}", "text": f"text number {i}"}) + "\n" for i in range(1500)))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    first = cluster.add_node(num_cpus=1)

    reports = []
    work = RequestWork("/v1/completions", {"max_tokens": 30, "ignore_eos": True})
    config = EngineConfig(threads=1, max_num_seqs=4)

    def answer():
        reports.append(jobs.run(work, bundle, config, str(source), str(tmp_path / "out"), actors=2))

    thread = threading.Thread(target=answer)
    try:
        with jobs.cluster(cluster.address, 2):
            thread.start()
            time.sleep(4)
            cluster.add_node(num_cpus=1)  # Ray does this in the main thread only
            time.sleep(4)
            cluster.remove_node(first, allow_graceful=False)
            thread.join(100)
        assert reports == [JobReport(1500, 0, 0)]
        found = [line["custom_id"] for line in Parts(str(tmp_path / "out")).lines()]
        assert sorted(found) == sorted(f"r{i}" for i in range(1500))
    finally:
        cluster.shutdown()
