"""hgrn2_bench: fair comparison of HGRN2 with other linear RNNs and linear attention."""
