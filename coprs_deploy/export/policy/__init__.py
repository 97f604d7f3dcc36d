"""The policy as OpenVINO graphs: conversion, compression, and the check against PyTorch."""
