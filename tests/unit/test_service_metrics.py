"""The reward service's metrics, by hand."""

import pytest

from rlver_dist.chat_client.metrics import ChatWindow
from rlver_dist.chat_client.protocol import ChatAnswer
from rlver_dist.tracking.metrics import reduce_metrics
from rlver_dist.tracking.service_metrics import service_metrics


def test_replicas_add_up_by_what_a_name_says():
    replicas = [
        {
            "requests": 30.0,
            "failures": 1.0,
            "latency_mean_s": 1.0,
            "latency_p95_s": 2.0,
            "queue_depth_max": 4.0,
            "chat_cost": 0.5,
        },
        {
            "requests": 10.0,
            "failures": 2.0,
            "latency_mean_s": 3.0,
            "latency_p95_s": 9.0,
            "queue_depth_max": 2.0,
            "chat_cost": 0.25,
        },
    ]
    values = reduce_metrics(service_metrics(replicas))
    assert values["simulator/replicas"] == 2
    assert values["simulator/requests"] == 40 and values["simulator/failures"] == 3
    assert values["simulator/latency_mean_s"] == pytest.approx(1.5)
    assert values["simulator/latency_p95_s"] == 9 and values["simulator/queue_depth_max"] == 4
    assert values["simulator/chat_cost"] == 0.75
    assert "simulator/prefix_cache_hit" not in values


def test_the_prefix_hit_rate_is_over_all_tokens_and_not_a_mean_of_rates():
    replicas = [
        {"requests": 1.0, "chat_prompt_tokens": 900.0, "chat_cached_tokens": 900.0},
        {"requests": 1.0, "chat_prompt_tokens": 100.0, "chat_cached_tokens": 0.0},
    ]
    assert reduce_metrics(service_metrics(replicas))["simulator/prefix_cache_hit"] == 0.9


def test_a_window_of_calls():
    window = ChatWindow()
    assert window.values()["calls"] == 0 and "latency_p50_s" not in window.values()
    for seconds in (1.0, 2.0, 3.0):
        window.add(
            ChatAnswer(
                text="{}",
                prompt_tokens=10,
                cached_tokens=4,
                completion_tokens=2,
                seconds=seconds,
                retries=1,
                model="m",
            )
        )
    window.fail()
    window.cancel()
    values = window.values()
    assert (values["calls"], values["failures"], values["cancelled"], values["retries"]) == (5, 1, 1, 3)
    assert (values["prompt_tokens"], values["cached_tokens"], values["completion_tokens"]) == (30, 12, 6)
    assert (
        values["latency_mean_s"],
        values["latency_p50_s"],
        values["latency_p99_s"],
        values["latency_max_s"],
    ) == (2, 2, 3, 3)
