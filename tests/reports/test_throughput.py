from forgather_fn.reports.throughput import Count, throughput


def test_rates_are_of_the_whole_job_between_two_instants():
    assert throughput(Count(1.0, 0, 0), Count(3.0, 64, 8192)) == {
        "samples_per_second": 32.0,
        "tokens_per_second": 4096.0,
    }
    assert throughput(Count(1.0, 0, 0), Count(1.0, 64, 8192)) == {}
