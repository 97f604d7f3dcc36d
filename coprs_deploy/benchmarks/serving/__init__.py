"""The parts of :mod:`coprs_deploy.benchmarks.policy_serving`."""
