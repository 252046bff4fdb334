-- Starts nothing new until it is resumed.
local status = obj.status or {}
-- Argo CD does not ask discovery.lua before it runs this: the menu may be old, or there was none.
local stack = status.candidate or status.live
if stack == nil or status.stoppedSince ~= nil then
  error("there is nothing to pause, or it is paused or suspended already")
end
obj.metadata.annotations = obj.metadata.annotations or {}
obj.metadata.annotations["exchange.dev/pause"] = stack.revision .. "." .. stack.attempt
-- Kubernetes sees Argo CD here, not the person: a signature would be somebody else's.
obj.metadata.annotations["exchange.dev/by"] = nil
return obj
