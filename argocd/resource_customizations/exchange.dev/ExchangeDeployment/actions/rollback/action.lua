-- Leaves the stack that is live, or is just becoming so, for the one before it.
local stack = obj.status.live
if obj.status.phase == "Promoting" then
  stack = obj.status.candidate
end
obj.metadata.annotations = obj.metadata.annotations or {}
obj.metadata.annotations["exchange.dev/rollback"] = stack.revision .. "." .. stack.attempt
-- Kubernetes sees Argo CD here, not the person: a signature would be somebody else's.
obj.metadata.annotations["exchange.dev/by"] = nil
return obj
