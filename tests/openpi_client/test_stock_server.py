"""Our client against a stock openpi server."""

import numpy as np
import pytest
from stock_openpi import StockServer

from openpi_client import ActionChunkBroker
from openpi_client.websocket_client_policy import PolicyServerError, WebsocketClientPolicy


def test_actions_and_metadata_of_a_stock_server():
    def answer(observation):
        assert observation["observation/image"].dtype == np.uint8
        assert observation["prompt"] == "go"
        return {"actions": np.tile(observation["observation/state"], (10, 1)), "scale": np.float32(2)}

    with StockServer(answer, {"reset_pose": [0.0, 1.0]}) as server:
        policy = WebsocketClientPolicy("127.0.0.1", server.port)
        assert policy.metadata == {"reset_pose": [0.0, 1.0]}
        observation = {
            "observation/image": np.zeros((8, 8, 3), np.uint8),
            "observation/state": np.arange(3, dtype=np.float32),
            "prompt": "go",
        }
        out = policy.infer(observation)
        assert out["actions"].shape == (10, 3)
        assert out["scale"] == np.float32(2)
        assert out["server_timing"] == {"infer_ms": 1.0}
        broker = ActionChunkBroker(policy, 5)
        assert broker.infer(observation)["actions"].tolist() == [0, 1, 2]
        policy.close()


def test_a_stock_servers_traceback_becomes_one_error():
    with StockServer(lambda observation: {"actions": observation["missing"]}, {}) as server:
        policy = WebsocketClientPolicy("127.0.0.1", server.port)
        with pytest.raises(PolicyServerError, match=r"failed: (.|\n)*KeyError: 'missing'"):
            policy.infer({"state": np.zeros(2, np.float32)})
        with pytest.raises(PolicyServerError, match="closed the connection"):
            policy.infer({"state": np.zeros(2, np.float32)})
