"""Numbers for Prometheus: the queue, steps and stages of drawing, memory, pictures by key, and HTTP itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SLOW = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """All of one server's numbers, in a registry of its own."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.queued = Gauge("inkstream_queue_jobs", "Jobs waiting.", registry=r)
        self.running = Gauge("inkstream_running_jobs", "Jobs being drawn.", registry=r)
        self.jobs = Counter("inkstream_jobs", "Jobs that ended.", ["state"], registry=r)
        self.refused = Counter("inkstream_refused", "Requests that were refused.", ["status"], registry=r)
        self.pictures = Counter("inkstream_pictures", "Pictures drawn.", ["key", "model"], registry=r)
        self.deaths = Counter("inkstream_engine_deaths", "Engines that ended unasked.", registry=r)
        self.ready = Gauge("inkstream_engine_ready", "1 while the engine takes jobs.", registry=r)
        self.memory = Gauge("inkstream_memory_bytes", "Memory of the engine.", ["kind"], registry=r)
        self.batch = Histogram(
            "inkstream_batch_size", "Jobs in hand at each step.", buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32), registry=r
        )
        self.step = Histogram("inkstream_step_seconds", "One step.", ["model"], buckets=FAST, registry=r)
        self.stage = Histogram("inkstream_stage_seconds", "One stage of a job.", ["stage"], buckets=SLOW, registry=r)
        self.http = Histogram(
            "inkstream_http_seconds", "Until an answer began.", ["method", "route", "status"], buckets=FAST, registry=r
        )

    def text(self) -> bytes:
        """All numbers, in Prometheus' text format."""
        return generate_latest(self.registry)
