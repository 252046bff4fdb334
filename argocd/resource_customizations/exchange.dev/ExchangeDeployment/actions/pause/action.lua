-- Starts nothing new until it is resumed.
local stack = obj.status.candidate or obj.status.live
obj.metadata.annotations = obj.metadata.annotations or {}
obj.metadata.annotations["exchange.dev/pause"] = stack.revision .. "." .. stack.attempt
-- Kubernetes sees Argo CD here, not the person: a signature would be somebody else's.
obj.metadata.annotations["exchange.dev/by"] = nil
return obj
