"""Metrics for Prometheus: the queue, steps and stages of drawing, memory, pictures by key, and HTTP."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SLOW = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """All metrics of one server, in their own registry."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.queued = Gauge("inkstream_queue_jobs", "Waiting jobs.", registry=r)
        self.running = Gauge("inkstream_running_jobs", "Running jobs.", registry=r)
        self.jobs = Counter("inkstream_jobs", "Jobs that ended.", ["state"], registry=r)
        self.refused = Counter("inkstream_refused", "Refused requests.", ["status"], registry=r)
        self.pictures = Counter("inkstream_pictures", "Drawn pictures.", ["key", "model"], registry=r)
        self.deaths = Counter("inkstream_engine_deaths", "Engine processes that ended unexpectedly.", registry=r)
        self.ready = Gauge("inkstream_engine_ready", "1 while the engine accepts jobs, else 0.", registry=r)
        self.memory = Gauge("inkstream_memory_bytes", "Memory of the engine process.", ["kind"], registry=r)
        self.batch = Histogram(
            "inkstream_batch_size", "Running jobs at each step.", buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32), registry=r
        )
        self.step = Histogram("inkstream_step_seconds", "Duration of one step.", ["model"], buckets=FAST, registry=r)
        self.stage = Histogram(
            "inkstream_stage_seconds", "Duration of one stage of a job.", ["stage"], buckets=SLOW, registry=r
        )
        self.http = Histogram(
            "inkstream_http_seconds",
            "Time until the answer began.",
            ["method", "route", "status"],
            buckets=FAST,
            registry=r,
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
