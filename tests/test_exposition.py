"""Prometheus' text format, as the uploader and the service write it."""

from profiler.exposition import Metric, encode, labelled, single


def test_metrics_are_lines_of_name_labels_and_value():
    """Values in the order of their labels, metrics in the order given."""
    metrics = [
        single("up_seconds", "gauge", 1.5),
        Metric("requests_total", "counter", {("top", "404"): 1, ("diff", "200"): 2}, ("of", "as")),
    ]

    assert encode(metrics).decode() == (
        "# TYPE up_seconds gauge\n"
        "up_seconds 1.5\n"
        "# TYPE requests_total counter\n"
        'requests_total{of="diff",as="200"} 2\n'
        'requests_total{of="top",as="404"} 1\n'
    )


def test_label_values_are_escaped():
    """Backslash, quote and line feed, as the format says."""
    line = encode([labelled("a", "gauge", "b", {'\\"\n': 1})]).decode().splitlines()[1]

    assert line == 'a{b="\\\\\\"\\n"} 1'


def test_nothing_of_a_metric_is_its_type_alone():
    assert encode([labelled("a", "gauge", "b", {})]) == b"# TYPE a gauge\n"
