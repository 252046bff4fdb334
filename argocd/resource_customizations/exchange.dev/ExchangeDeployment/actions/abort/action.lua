-- Gives the candidate up. What is live is not touched.
local status = obj.status or {}
-- Argo CD does not ask discovery.lua before it runs this: the menu may be old, or there was none.
if status.candidate == nil or status.phase == "Promoting" or status.phase == "RollingBack" then
  error("there is nothing to abort now")
end
local stack = status.candidate
obj.metadata.annotations = obj.metadata.annotations or {}
obj.metadata.annotations["exchange.dev/abort"] = stack.revision .. "." .. stack.attempt
-- Kubernetes sees Argo CD here, not the person: a signature would be somebody else's.
obj.metadata.annotations["exchange.dev/by"] = nil
return obj
